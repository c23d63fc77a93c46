//! Reading files ahead of whoever uses them, so that the disk is busy while bytes are packed and copied.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use crate::memory::Source;

/// Bytes that are asked for beyond those in use, which are a matrix or an expert: of gpt-oss at most the 1.2 GB of its
/// unembedding.
const AHEAD_BYTES: usize = 256 << 20;
/// Bytes that are asked for at a time.
const PIECE_BYTES: usize = 512 << 10;

/// How much is used of parts of files that are used in a known order.
#[derive(Debug)]
pub struct ReadAhead<'a> {
    parts: &'a [Source<'a>],
    /// The part that is used next.
    next: AtomicUsize,
    /// Bytes that are used or in use; `None` when nobody uses any more.
    used: Mutex<Option<usize>>,
    moved: Condvar,
}

impl<'a> ReadAhead<'a> {
    /// Does `work`, which uses `parts` in their order and says so. Meanwhile a thread asks the system for pages of files: for
    /// those in use, for 256 MiB beyond, and for none that are not of `parts`; without any it asks for nothing.
    pub fn during<T>(parts: &'a [Source<'a>], work: impl FnOnce(&Self) -> T) -> T {
        let this = Self::of(parts);
        std::thread::scope(|scope| {
            let ask = || {
                crate::threads::unbind();
                this.ask(AHEAD_BYTES, |piece| piece.will_need());
            };
            // Without the thread, pages come when they are used.
            let _thread = Builder::new().name("ahead".to_owned()).spawn_scoped(scope, ask);
            let end = End(&this);
            work(end.0)
        })
    }

    const fn of(parts: &'a [Source<'a>]) -> Self {
        Self { parts, next: AtomicUsize::new(0), used: Mutex::new(Some(0)), moved: Condvar::new() }
    }

    /// The next parts, which are these, are used from now on.
    pub fn using(&self, parts: &[Source<'_>]) {
        let next = self.next.fetch_add(parts.len(), Ordering::Relaxed);
        let same = |(one, other): (&Source<'_>, &Source<'_>)| std::ptr::eq(one.bytes(), other.bytes());
        debug_assert!(
            self.parts.is_empty()
                || self.parts[next..].len() >= parts.len() && self.parts[next..].iter().zip(parts).all(same),
            "part {next} of those that are read ahead is not what is used"
        );
        self.advance(parts.iter().map(|part| part.bytes().len()).sum());
    }

    fn advance(&self, bytes: usize) {
        self.set(|used| used.map(|used| used.saturating_add(bytes)));
    }

    fn set(&self, to: impl FnOnce(Option<usize>) -> Option<usize>) {
        let mut used = self.lock();
        *used = to(*used);
        self.moved.notify_one();
    }

    fn ask(&self, ahead: usize, mut ask: impl FnMut(Source<'a>)) {
        let mut asked = 0;
        for part in self.parts {
            let len = part.bytes().len();
            for start in (0..len).step_by(PIECE_BYTES) {
                let far = |used: &mut Option<usize>| used.is_some_and(|used| used.saturating_add(ahead) <= asked);
                let used = *self.moved.wait_while(self.lock(), far).unwrap_or_else(PoisonError::into_inner);
                if used.is_none() {
                    return;
                }
                let end = len.min(start + PIECE_BYTES);
                part.slice(start..end).into_iter().for_each(&mut ask);
                asked += end - start;
            }
        }
    }

    /// A number is whole, whoever panicked.
    fn lock(&self) -> MutexGuard<'_, Option<usize>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the asking, however the work ends.
struct End<'a, 'b>(&'b ReadAhead<'a>);

impl Drop for End<'_, '_> {
    fn drop(&mut self) {
        self.0.set(|_| None);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn parts_are_asked_for_in_order_and_no_further_ahead_than_allowed() {
        const AHEAD: usize = 2 * PIECE_BYTES;
        let bytes: Vec<u8> = (0..9 * PIECE_BYTES).map(|i| (i / 1000 % 251) as u8).collect();
        let ranges = [0..PIECE_BYTES + 7, 3 * PIECE_BYTES..3 * PIECE_BYTES, 4 * PIECE_BYTES..8 * PIECE_BYTES + 1, 5..6];
        let parts = ranges.map(|range| Source::memory(&bytes[range]));
        let total = parts.iter().map(|part| part.bytes().len()).sum::<usize>();
        let this = ReadAhead::of(&parts);
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            let this = &this;
            scope.spawn(move || {
                let mut asked = 0;
                this.ask(AHEAD, |piece| {
                    assert!(asked < this.lock().unwrap() + AHEAD, "{asked} bytes were asked for");
                    asked += piece.bytes().len();
                    sender.send(piece.bytes()).unwrap();
                });
            });
            let (mut got, mut used) = (Vec::new(), 0);
            for step in [0, 1, PIECE_BYTES, 3 * PIECE_BYTES, total] {
                used += step;
                this.advance(step);
                while got.len() < total.min(used + AHEAD) {
                    got.extend_from_slice(receiver.recv().unwrap());
                }
            }
            assert!(got == parts.map(|part| part.bytes().to_vec()).concat());
            assert!(receiver.recv().is_err(), "all has been asked for");
        });
    }

    #[test]
    #[should_panic(expected = "part 1 of those that are read ahead is not what is used")]
    #[cfg(debug_assertions)]
    fn parts_in_another_order_are_seen() {
        let bytes = vec![0; 300];
        let parts = [0..100, 100..200, 200..300].map(|range| Source::memory(&bytes[range]));
        ReadAhead::during(&parts, |ahead| {
            ahead.using(&parts[..1]);
            ahead.using(&parts[2..]);
        });
    }

    #[test]
    fn work_that_ends_early_is_not_waited_for() {
        let bytes = vec![0; 1 << 20];
        let parts = vec![Source::memory(&bytes); 2 * AHEAD_BYTES / bytes.len()];
        assert_eq!(ReadAhead::during(&parts, |_| 5), 5);
        let panics = || ReadAhead::during(&parts, |_| panic!("within"));
        assert!(std::panic::catch_unwind(panics).is_err());
    }
}
