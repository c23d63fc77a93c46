//! Copies between host and device by way of pinned memory: while the device reads one piece, the host fills the next.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::device::{Device, Pinned, STAGED_MAX};
use super::wait::{Limit, until};
use crate::KernelError;
use crate::memory::{Aligned, will_need};

/// Pieces for weights: an expert of the published models fits one.
const WEIGHTS: Pieces = Pieces { bytes: 16 << 20, count: 4 };
/// Pieces for what steps bring: inputs, and rows and draws of each part of the logits. Those of a step are read while it
/// runs, when the next one is filled in already.
const STEPS: Pieces = Pieces { bytes: 1 << 20, count: 32 };
/// Threads that fill a whole piece: one alone does not read a mapped file as fast as a disk gives it.
const READERS: usize = 4;
/// What a thread is worth starting for.
const READER_BYTES: usize = 1 << 20;

/// What is waited for.
const TAKE: &str = "take bytes";
const FINISH: &str = "finish";

/// How long pieces are, and how many are filled and read at the same time.
#[derive(Clone, Copy, Debug)]
struct Pieces {
    bytes: usize,
    count: usize,
}

/// Copies to a device, and from it.
#[derive(Debug)]
pub(super) struct Ferries {
    weights: Ferry,
    steps: Ferry,
}

impl Default for Ferries {
    fn default() -> Self {
        Self { weights: Ferry::new(WEIGHTS), steps: Ferry::new(STEPS) }
    }
}

impl Ferries {
    /// The one for so many bytes.
    pub(super) const fn of(&mut self, bytes: usize) -> &mut Ferry {
        if bytes <= STEPS.bytes { &mut self.steps } else { &mut self.weights }
    }

    /// Makes all pieces for what steps bring.
    pub(super) fn pin_steps(&mut self, device: &dyn Device) -> Result<(), KernelError> {
        while self.steps.pieces.len() < self.steps.size.count {
            self.steps.pieces.push(device.pin(self.steps.size.bytes)?);
        }
        Ok(())
    }
}

/// Pinned memory in pieces, used in turn.
#[derive(Debug)]
pub(super) struct Ferry {
    size: Pieces,
    pieces: Vec<Box<dyn Pinned>>,
    next: usize,
    /// The device has no pinned memory: bytes go to it as they are.
    none: bool,
}

impl Ferry {
    const fn new(size: Pieces) -> Self {
        Self { size, pieces: Vec::new(), next: 0, none: false }
    }

    /// Copies bytes to the device that `make` writes: straight into a piece, if they fit one.
    ///
    /// # Safety
    /// As [`Device::upload`].
    pub(super) unsafe fn upload_made(
        &mut self,
        device: &dyn Device,
        limit: Limit,
        bytes: usize,
        to: u64,
        make: impl FnOnce(&mut [u8]) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        if bytes <= self.size.bytes
            && let Some(pinned) = self.next(device)
        {
            make(&mut ready(pinned, limit.deadline())?[..bytes])?;
            // SAFETY: what the caller promises.
            return unsafe { pinned.send(bytes, to) };
        }
        let mut made = Aligned::zeroed(bytes);
        make(&mut made)?;
        // SAFETY: what the caller promises.
        unsafe { self.upload(device, limit, &made, to) }
    }

    /// Copies bytes to the device; they may change as soon as this returns.
    ///
    /// # Safety
    /// As [`Device::upload`].
    pub(super) unsafe fn upload(
        &mut self,
        device: &dyn Device,
        limit: Limit,
        from: &[u8],
        to: u64,
    ) -> Result<(), KernelError> {
        let Pieces { bytes, count } = self.size;
        // The system reads ahead of the pieces that are copied.
        let ahead = |piece: usize| from.chunks(bytes).nth(piece).into_iter().for_each(will_need);
        (0..count).for_each(ahead);
        for (i, piece) in from.chunks(bytes).enumerate() {
            ahead(i + count);
            let to = to + (i * bytes) as u64;
            let Some(pinned) = self.next(device) else {
                if piece.len() > STAGED_MAX {
                    until(TAKE, limit.deadline(), || device.is_idle())?;
                }
                // SAFETY: a part of what the caller promises.
                unsafe { device.upload(piece, to)? };
                continue;
            };
            // What was sent from there before has been read.
            fill(&mut ready(pinned, limit.deadline())?[..piece.len()], piece);
            // SAFETY: a part of what the caller promises.
            unsafe { pinned.send(piece.len(), to)? };
        }
        Ok(())
    }

    /// Copies bytes from the device; waits for them.
    ///
    /// # Safety
    /// As [`Device::download`], without its demand that all is done.
    pub(super) unsafe fn download(
        &mut self,
        device: &dyn Device,
        limit: Limit,
        from: u64,
        to: &mut [u8],
    ) -> Result<(), KernelError> {
        let bytes = self.size.bytes;
        for (i, piece) in to.chunks_mut(bytes).enumerate() {
            let from = from + (i * bytes) as u64;
            let Some(pinned) = self.next(device) else {
                until(FINISH, limit.deadline(), || device.is_idle())?;
                // SAFETY: a part of what the caller promises.
                unsafe { device.download(from, piece)? };
                continue;
            };
            ready(pinned, limit.deadline())?;
            // SAFETY: a part of what the caller promises.
            unsafe { pinned.fetch(from, 0, piece.len())? };
            piece.copy_from_slice(&ready(pinned, limit.deadline())?[..piece.len()]);
        }
        Ok(())
    }

    /// The piece whose turn it is.
    fn next(&mut self, device: &dyn Device) -> Option<&mut Box<dyn Pinned>> {
        if self.pieces.len() < self.size.count && !self.none {
            match device.pin(self.size.bytes) {
                Ok(pinned) => self.pieces.push(pinned),
                // With fewer pieces, or none, it is slower and as right.
                Err(_) => self.none = true,
            }
            self.next = self.pieces.len().saturating_sub(1);
        } else if !self.pieces.is_empty() {
            self.next = (self.next + 1) % self.pieces.len();
        }
        self.pieces.get_mut(self.next)
    }
}

/// The memory, once no copy is under way.
pub(super) fn ready(pinned: &mut Box<dyn Pinned>, deadline: Instant) -> Result<&mut [u8], KernelError> {
    until(FINISH, deadline, || pinned.is_done())?;
    pinned.bytes()
}

/// Copies by several threads where that is worth it.
fn fill(to: &mut [u8], from: &[u8]) {
    let share = from.len().div_ceil(READERS).max(READER_BYTES);
    let done = [const { AtomicBool::new(false) }; READERS];
    std::thread::scope(|scope| {
        let mut shares = to.chunks_mut(share).zip(from.chunks(share)).zip(&done);
        let own = shares.next();
        for ((to, from), done) in shares {
            // A thread that does not start leaves its share to this one.
            let _ = std::thread::Builder::new().spawn_scoped(scope, move || {
                to.copy_from_slice(from);
                done.store(true, Ordering::Release);
            });
        }
        if let Some(((to, from), done)) = own {
            to.copy_from_slice(from);
            done.store(true, Ordering::Release);
        }
    });
    let shares = to.chunks_mut(share).zip(from.chunks(share)).zip(&done);
    for ((to, from), _) in shares.filter(|(_, done)| !done.load(Ordering::Acquire)) {
        to.copy_from_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::ffi::c_void;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;
    use crate::cuda::{Family, Graph, Launch, Sequence};

    /// A device that reads pinned memory as late as it may: when it is asked whether it has.
    #[derive(Debug)]
    struct Late {
        memory: Arc<Mutex<Vec<u8>>>,
        /// Pieces that can be had.
        pieces: Mutex<usize>,
        /// Whether it does before it says so.
        reads: bool,
        /// It never does.
        hangs: bool,
    }

    #[derive(Debug)]
    struct Piece {
        bytes: Vec<u8>,
        sent: Cell<Option<(usize, usize)>>,
        memory: Arc<Mutex<Vec<u8>>>,
        reads: bool,
        hangs: bool,
    }

    impl Piece {
        fn read(&self) {
            if let Some((bytes, to)) = self.sent.take() {
                self.memory.lock().unwrap()[to..to + bytes].copy_from_slice(&self.bytes[..bytes]);
            }
        }
    }

    impl Pinned for Piece {
        fn bytes(&mut self) -> Result<&mut [u8], KernelError> {
            if self.reads && self.sent.get().is_some() {
                return Err(KernelError::Late { what: "finish a copy" });
            }
            Ok(&mut self.bytes)
        }
        unsafe fn send(&mut self, bytes: usize, to: u64) -> Result<(), KernelError> {
            self.read();
            self.sent.set(Some((bytes, to as usize)));
            Ok(())
        }
        unsafe fn fetch(&mut self, from: u64, at: usize, bytes: usize) -> Result<(), KernelError> {
            let from = from as usize;
            self.bytes[at..at + bytes].copy_from_slice(&self.memory.lock().unwrap()[from..from + bytes]);
            Ok(())
        }
        fn is_done(&self) -> Result<bool, KernelError> {
            if self.reads && !self.hangs {
                self.read();
            }
            Ok(!self.hangs || self.sent.get().is_none())
        }
    }

    impl Device for Late {
        fn is_idle(&self) -> Result<bool, KernelError> {
            Ok(true)
        }
        fn stream(&self) -> Result<*mut std::ffi::c_void, KernelError> {
            Ok(std::ptr::null_mut())
        }
        fn uuid(&self) -> Result<[u8; 16], KernelError> {
            Ok([0; 16])
        }

        fn multiprocessors(&self) -> u32 {
            1
        }

        fn family(&self) -> Family {
            Family::Mma
        }
        fn allocate(&self, _bytes: usize) -> Result<u64, KernelError> {
            Ok(0)
        }
        unsafe fn free(&self, _address: u64, _bytes: usize) {}
        unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
            self.memory.lock().unwrap()[to as usize..to as usize + from.len()].copy_from_slice(from);
            Ok(())
        }
        unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
            to.copy_from_slice(&self.memory.lock().unwrap()[from as usize..from as usize + to.len()]);
            Ok(())
        }
        unsafe fn copy(&self, _from: u64, _to: u64, _bytes: usize) -> Result<(), KernelError> {
            Ok(())
        }
        unsafe fn zero(&self, _to: u64, _bytes: usize) -> Result<(), KernelError> {
            Ok(())
        }
        unsafe fn launch(&self, _launch: Launch<'_>, _args: *const c_void, _bytes: usize) -> Result<(), KernelError> {
            Ok(())
        }
        fn graph(&self, _nodes: &Sequence) -> Result<Box<dyn Graph>, KernelError> {
            Err(KernelError::Device { what: "make a graph", why: String::new() })
        }
        fn pin(&self, bytes: usize) -> Result<Box<dyn Pinned>, KernelError> {
            let mut left = self.pieces.lock().unwrap();
            *left = left.checked_sub(1).ok_or(KernelError::Device { what: "pin memory", why: String::new() })?;
            let memory = Arc::clone(&self.memory);
            let (reads, hangs) = (self.reads, self.hangs);
            Ok(Box::new(Piece { bytes: vec![0; bytes], sent: Cell::new(None), memory, reads, hangs }))
        }
    }

    fn soon() -> Limit {
        Limit::For(Duration::from_secs(60))
    }

    /// What is on the device after uploads of many sizes, and what should be.
    fn upload(pieces: usize, reads: bool) -> (Vec<u8>, Vec<u8>, usize) {
        const BYTES: usize = 100;
        let expected: Vec<u8> = (0..5000u32).map(|i| (i * 7 % 251) as u8).collect();
        let memory = Arc::new(Mutex::new(vec![0; expected.len()]));
        let device = Late { memory: Arc::clone(&memory), pieces: Mutex::new(pieces), reads, hangs: false };
        let mut ferry = Ferry::new(Pieces { bytes: BYTES, count: 4 });
        let mut at = 0;
        for size in [1, 99, 100, 101, 0, 350, 3000, 7, 1342] {
            // SAFETY: a vector, which checks.
            unsafe { ferry.upload(&device, soon(), &expected[at..at + size], at as u64) }.unwrap();
            at += size;
        }
        assert_eq!(at, expected.len());
        // What is still under way.
        // SAFETY: no bytes.
        ferry.pieces.iter_mut().for_each(|piece| unsafe { piece.send(0, 0) }.unwrap());
        let got = memory.lock().unwrap().clone();
        (expected, got, ferry.pieces.len())
    }

    #[test]
    fn bytes_arrive_in_any_number_of_pieces() {
        for (pieces, made) in [(0, 0), (1, 1), (2, 2), (9, 4)] {
            let (expected, got, pieces) = upload(pieces, true);
            assert_eq!(pieces, made);
            assert!(expected == got, "{pieces} pieces");
        }
    }

    #[test]
    fn what_is_made_in_a_piece_arrives_and_what_fails_does_not() {
        for pieces in [0, 1, 9] {
            let memory = Arc::new(Mutex::new(vec![0; 12]));
            let device = Late { memory: Arc::clone(&memory), pieces: Mutex::new(pieces), reads: true, hangs: false };
            let mut ferry = Ferry::new(Pieces { bytes: 7, count: 2 });
            for i in 0..3u8 {
                let make = |out: &mut [u8]| {
                    out.fill(i + 1);
                    if i == 1 { Err(KernelError::Device { what: "be made", why: String::new() }) } else { Ok(()) }
                };
                // SAFETY: a vector, which checks.
                let made = unsafe { ferry.upload_made(&device, soon(), 4, u64::from(i) * 4, make) };
                assert_eq!(made.is_ok(), i != 1);
            }
            ferry.pieces.iter_mut().for_each(|piece| assert!(piece.is_done().unwrap()));
            assert_eq!(*memory.lock().unwrap(), [1, 1, 1, 1, 0, 0, 0, 0, 3, 3, 3, 3], "{pieces} pieces");
        }
    }

    #[test]
    fn a_piece_that_is_filled_before_it_was_read_is_seen() {
        let (expected, got, _) = upload(9, false);
        assert!(expected != got);
    }

    #[test]
    fn bytes_come_back_in_any_number_of_pieces() {
        let expected: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
        for pieces in [0, 1, 9] {
            let memory = Arc::new(Mutex::new(expected.clone()));
            let device = Late { memory, pieces: Mutex::new(pieces), reads: true, hangs: false };
            let mut ferry = Ferry::new(Pieces { bytes: 100, count: 4 });
            for range in [0..1, 3..103, 7..1000, 5..5] {
                let mut got = vec![0; range.len()];
                // SAFETY: a vector, which checks.
                unsafe { ferry.download(&device, soon(), range.start as u64, &mut got) }.unwrap();
                assert!(got == expected[range.clone()], "{range:?}, {pieces} pieces");
            }
        }
    }

    #[test]
    fn a_device_that_hangs_is_late_and_not_waited_for() {
        let device = Late { memory: Arc::new(Mutex::new(vec![0; 9])), pieces: Mutex::new(1), reads: true, hangs: true };
        let mut ferry = Ferry::new(Pieces { bytes: 4, count: 1 });
        // SAFETY: a vector, which checks.
        let sent = unsafe { ferry.upload(&device, Limit::Until(Instant::now()), &[1; 9], 0) };
        assert_eq!(sent, Err(KernelError::Late { what: FINISH }));
        assert!(ferry.pieces[0].bytes().is_err(), "nobody may touch what is still read");
    }

    #[test]
    fn several_threads_fill_every_byte_once() {
        for bytes in [0, 1, READER_BYTES, READER_BYTES + 1, READERS * READER_BYTES + 77] {
            let from: Vec<u8> = (0..bytes).map(|i| (i % 253) as u8).collect();
            let mut to = vec![255; bytes];
            fill(&mut to, &from);
            assert!(from == to, "{bytes} bytes");
        }
    }
}
