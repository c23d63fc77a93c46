//! A stream of host memory: what is put on it is done in order, whenever somebody looks.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use cudarc::nccl::sys::cudaStream_t;
use phalanx_kernels::KernelError;

use super::{Comm, lock};

/// What a stream does.
pub(super) enum Work {
    /// Sends and receives of a group, all at once.
    Group(Group),
    /// An op of the device.
    Op(Box<dyn FnOnce() -> Result<(), KernelError> + Send>),
}

/// A group of calls.
#[derive(Clone, Default)]
pub(super) struct Group {
    pub(super) sends: Vec<Sending>,
    pub(super) receives: Vec<Pending>,
    /// It is one call, by which all are sent the same.
    pub(super) gathers: bool,
}

/// A send that waits on a stream.
#[derive(Clone)]
pub(super) struct Sending {
    pub(super) comm: &'static Comm,
    pub(super) to: usize,
    pub(super) from: usize,
    pub(super) bytes: usize,
}

impl Sending {
    fn send(self) {
        let Self { comm, to, from, bytes } = self;
        let from = std::ptr::with_exposed_provenance::<u8>(from);
        // SAFETY: whoever enqueued the send vouched for so many bytes until the stream is through with it.
        let bytes = unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec();
        let mut world = lock(&comm.world);
        if !world.faults(comm.rank).sends_nothing {
            world.mail.entry((comm.rank, to)).or_default().push_back(bytes);
        }
    }
}

/// A receive that waits on a stream.
#[derive(Clone)]
pub(super) struct Pending {
    pub(super) comm: &'static Comm,
    pub(super) from: usize,
    pub(super) into: usize,
    pub(super) bytes: usize,
    /// Another size was sent: it never ends.
    pub(super) refused: bool,
}

impl Pending {
    /// Takes what was sent. Whether there was something.
    fn take(&mut self) -> bool {
        let mut world = lock(&self.comm.world);
        let (from, to) = (self.from, self.comm.rank);
        let Some(bytes) = world.mail.get_mut(&(from, to)).and_then(VecDeque::pop_front) else { return false };
        if bytes.len() != self.bytes {
            world.misuse.push(format!("{from} sends {} bytes where {to} receives {}", bytes.len(), self.bytes));
            self.refused = true;
            return false;
        }
        let into = std::ptr::with_exposed_provenance_mut::<u8>(self.into);
        // SAFETY: whoever enqueued the receive vouched for so many bytes until the stream is through with it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into, bytes.len()) };
        true
    }
}

impl Group {
    /// The communicator that it was called on, unless it does nothing.
    fn comm(&self) -> Option<&'static Comm> {
        self.sends.first().map(|sending| sending.comm).or_else(|| self.receives.first().map(|pending| pending.comm))
    }

    /// Goes as far as it can. Whether it is done.
    fn advance(&mut self) -> bool {
        let alive = |comm: &Comm| comm.alive.load(Ordering::SeqCst);
        // A communicator's end takes its work off the stream.
        self.sends.drain(..).filter(|sending| alive(sending.comm)).for_each(Sending::send);
        let mut held: Vec<usize> = Vec::new();
        self.receives.retain_mut(|pending| {
            let waits = alive(pending.comm) && (held.contains(&pending.from) || pending.refused || !pending.take());
            if waits {
                held.push(pending.from);
            }
            waits
        });
        self.receives.is_empty()
    }
}

/// Never given back.
#[derive(Default)]
pub(super) struct Stream {
    work: VecDeque<Work>,
    /// What failed; it stays so.
    error: Option<KernelError>,
    /// Most groups at once.
    groups_max: usize,
    /// What is put on it is kept, and not done.
    captures: bool,
}

fn stream_of(stream: cudaStream_t) -> &'static Mutex<Stream> {
    // SAFETY: tests use streams of `new_stream` alone, which are leaked.
    unsafe { &*stream.cast::<Mutex<Stream>>() }
}

pub(in super::super) fn new_stream() -> cudaStream_t {
    let stream: &'static Mutex<Stream> = Box::leak(Box::default());
    std::ptr::from_ref(stream).cast_mut().cast()
}

pub(super) fn enqueue(stream: cudaStream_t, work: Work) {
    let mut stream = lock(stream_of(stream));
    if let Work::Group(group) = &work
        && let Some(comm) = group.comm()
    {
        let most = group.receives.iter().map(|pending| pending.bytes).max().unwrap_or(0);
        comm.called((group.gathers, most), stream.captures);
    }
    stream.work.push_back(work);
    let groups = stream.work.iter().filter(|work| matches!(work, Work::Group(_))).count();
    stream.groups_max = stream.groups_max.max(groups);
}

/// The groups that `enqueue` puts onto a stream that it is told.
pub(super) fn capture<E>(enqueue: impl FnOnce(cudaStream_t) -> Result<(), E>) -> Result<Recording, E> {
    let raw = new_stream();
    lock(stream_of(raw)).captures = true;
    enqueue(raw)?;
    let work = std::mem::take(&mut lock(stream_of(raw)).work);
    let group = |work| match work {
        Work::Group(group) => Some(group),
        Work::Op(_) => None,
    };
    let groups: Vec<Group> = work.into_iter().filter_map(group).collect();
    for comm in groups.iter().filter_map(Group::comm) {
        comm.held.fetch_add(1, Ordering::SeqCst);
    }
    Ok(Recording { groups })
}

/// Groups that were captured; their communicators must not end before it.
pub(super) struct Recording {
    groups: Vec<Group>,
}

impl Recording {
    /// Puts them onto a stream.
    pub(super) fn enqueue(&self, stream: cudaStream_t) {
        let mut stream = lock(stream_of(stream));
        for group in &self.groups {
            if let Some(comm) = group.comm()
                && !comm.alive.load(Ordering::SeqCst)
            {
                lock(&comm.world).misuse.push(format!("a graph of rank {} after its end", comm.rank));
            }
            stream.work.push_back(Work::Group(group.clone()));
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        for comm in self.groups.iter().filter_map(Group::comm) {
            comm.held.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// The most groups that ever waited on the stream.
pub(super) fn groups_max(stream: cudaStream_t) -> usize {
    lock(stream_of(stream)).groups_max
}

/// Goes as far as it can. Whether everything on the stream is done.
pub(in super::super) fn advance(stream: cudaStream_t) -> bool {
    try_advance(stream).unwrap()
}

/// [`advance`], or what failed on the stream.
pub(super) fn try_advance(stream: cudaStream_t) -> Result<bool, KernelError> {
    let mut stream = lock(stream_of(stream));
    while let Some(work) = stream.work.pop_front() {
        match work {
            Work::Group(mut group) => {
                if !group.advance() {
                    stream.work.push_front(Work::Group(group));
                    break;
                }
            }
            Work::Op(op) => {
                if let Err(error) = op() {
                    stream.error.get_or_insert(error);
                }
            }
        }
    }
    stream.error.clone().map_or_else(|| Ok(stream.work.is_empty()), Err)
}
