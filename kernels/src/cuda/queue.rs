//! Ops are recorded and submitted together: what a step enqueues becomes graphs of the device, so that the host's work
//! between two kernels is an entry in a list.
//!
//! What is recorded is submitted when something must be waited for or copied from the host, and whenever enough has come
//! together for the device to begin. A submission that is seen again, kernel for kernel, becomes a graph; later ones of the
//! same structure change only the nodes that differ, by comparing all of their bytes, and launch it. So every submission
//! does what its launches one by one would do, whatever memory was freed or moved in between.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::device::{Captured, Device, Graph, Launch, Pinned};
use super::pinned::Ferries;
use super::sequence::{Node, Sequence};
use super::wait::{Limit, PATIENCE, until};
use crate::KernelError;

/// Nodes of a submission, at most: the device begins with the first layers while the host records the next ones.
const NODES_MAX: usize = 256;
/// Fewer nodes are launched one by one.
const NODES_MIN: usize = 4;
/// Graphs that are kept, and their nodes in all.
const GRAPHS_MAX: usize = 256;
const GRAPH_NODES_MAX: usize = 16 << 10;
/// Nodes that something captured counts as: NCCL waits for its stream, runs a kernel, records an event, may call the host; and
/// there is a graph of it alone.
pub(super) const CAPTURED_NODES: usize = 5;
/// Bytes of the device that a driver takes for a node: about as much as is told of graphs of PyTorch. Not measured here.
const GRAPH_NODE_BYTES: u64 = 64 << 10;
/// Bytes of the device that drivers take for graphs, beside what is allocated.
pub const GRAPH_BYTES: u64 = GRAPH_NODES_MAX as u64 * GRAPH_NODE_BYTES;
/// Structures that are remembered after their first sight.
const SEEN_MAX: usize = 64;

/// Launches and copies that a device has been given and is not known to be done with, at most: a stream takes about a
/// thousand, and one more would wait for it without a deadline. A graph counts as one.
const AHEAD_MAX: u64 = 768;

/// What a backend's queue has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Copies from the host.
    pub uploads: u64,
    /// Copies to the host.
    pub downloads: u64,
    /// Sequences of launches, device copies and zeros that were submitted.
    pub submissions: u64,
    /// Of these, how many as a graph.
    pub graphs: u64,
    /// Nodes in all submissions.
    pub nodes: u64,
    /// Graphs made.
    pub instantiated: u64,
    /// Nodes of graphs that were changed before a launch.
    pub updated: u64,
    /// Graphs given up for others.
    pub evicted: u64,
    /// Graphs that submissions were compared with.
    pub compared: u64,
}

/// The order of a device's stream, recorded.
#[derive(Debug)]
pub(super) struct Queue {
    /// Declared first: graphs and pinned memory go before the device that made them.
    state: Mutex<State>,
    device: Arc<dyn Device>,
}

#[derive(Debug)]
struct State {
    /// Until when a step may wait for the device.
    deadline: Option<Instant>,
    /// How long anything else may.
    patience: Duration,
    /// Launches and copies that the device was given, and how many of the first it is known to be done with.
    given: u64,
    done: u64,
    recorded: Sequence,
    /// The last launched comes last.
    graphs: Vec<Kept>,
    seen: VecDeque<u64>,
    /// The device makes no graphs.
    plain: bool,
    /// Why nothing is submitted any more: what was recorded when this happened is lost.
    failed: Option<KernelError>,
    /// Why, until it was told.
    warning: Option<KernelError>,
    counts: Counts,
    ferries: Ferries,
}

impl Default for State {
    fn default() -> Self {
        Self {
            deadline: None,
            patience: PATIENCE,
            given: 0,
            done: 0,
            recorded: Sequence::default(),
            graphs: Vec::new(),
            seen: VecDeque::new(),
            plain: false,
            failed: None,
            warning: None,
            counts: Counts::default(),
            ferries: Ferries::default(),
        }
    }
}

/// A graph and what its nodes are.
#[derive(Debug)]
struct Kept {
    graph: Box<dyn Graph>,
    nodes: Sequence,
    structure: u64,
}

impl Queue {
    pub(super) fn new(device: Arc<dyn Device>) -> Self {
        Self { state: Mutex::default(), device }
    }

    pub(super) fn device(&self) -> &dyn Device {
        &*self.device
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic halfway leaves at worst a graph whose nodes are not what is noted of them; so none is used after it.
        self.state.lock().unwrap_or_else(|poisoned| {
            let mut state = PoisonError::into_inner(poisoned);
            state.graphs.clear();
            state
        })
    }

    /// Until when the host waits for the device from here on: the deadline of a step, or the usual patience.
    pub(super) fn set_deadline(&self, deadline: Option<Instant>) {
        self.state().deadline = deadline;
    }

    /// How long the host waits for the device outside of steps.
    pub(super) fn set_patience(&self, patience: Duration) {
        self.state().patience = patience;
    }

    /// Until when a wait that begins now may last.
    pub(super) fn deadline(&self) -> Instant {
        self.state().limit().deadline()
    }

    /// Whether the device is done with all; does not wait.
    pub(super) fn is_idle(&self) -> Result<bool, KernelError> {
        let mut state = self.state();
        state.submit(&*self.device)?;
        let idle = self.device.is_idle()?;
        if idle {
            state.done = state.given;
        }
        Ok(idle)
    }

    /// How much the device was given so far.
    pub(super) fn given(&self) -> u64 {
        self.state().given
    }

    /// The device is done with what it had been given when [`Queue::given`] said this.
    pub(super) fn note_done(&self, given: u64) {
        let mut state = self.state();
        state.done = state.done.max(given);
    }

    pub(super) fn counts(&self) -> Counts {
        self.state().counts
    }

    /// What a graph failed with first, after which nodes are launched one by one; told once.
    pub(super) fn take_warning(&self) -> Option<KernelError> {
        self.state().warning.take()
    }

    fn record(&self, push: impl FnOnce(&mut Sequence)) -> Result<(), KernelError> {
        let mut state = self.state();
        push(&mut state.recorded);
        if state.recorded.len() < NODES_MAX { Ok(()) } else { state.submit(&*self.device) }
    }

    /// Submits what is recorded.
    pub(super) fn submit(&self) -> Result<(), KernelError> {
        self.state().submit(&*self.device)
    }

    /// Records a launch.
    ///
    /// # Safety
    /// As [`Device::launch`] when it is submitted, and the arguments have no padding and a multiple of 8 bytes.
    pub(super) unsafe fn launch(
        &self,
        launch: Launch<'_>,
        args: *const c_void,
        args_bytes: usize,
    ) -> Result<(), KernelError> {
        // SAFETY: as the caller promises.
        self.record(|recorded| unsafe { recorded.push_launch(launch, args, args_bytes) })
    }

    /// Records a copy.
    ///
    /// # Safety
    /// As [`Device::copy`]; `bytes` is not 0.
    pub(super) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        self.record(|recorded| recorded.push(Node::Copy { from, to, bytes }))
    }

    /// Records that bytes are set to zero.
    ///
    /// # Safety
    /// As [`Device::zero`]; `bytes` is not 0.
    pub(super) unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), KernelError> {
        self.record(|recorded| recorded.push(Node::Zero { to, bytes }))
    }

    /// Records that something captured is done.
    ///
    /// # Safety
    /// As [`Capture::launch`](super::Capture::launch), until [`Queue::forget_captured`].
    pub(super) unsafe fn enqueue_captured(&self, captured: &Captured) -> Result<(), KernelError> {
        self.record(|recorded| recorded.push(Node::Captured(captured)))
    }

    /// Forgets all that was captured, and the graphs it is part of: what was recorded of it and not yet submitted is left out.
    pub(super) fn forget_captured(&self) {
        let mut state = self.state();
        state.recorded.forget_captured();
        state.graphs.retain(|kept| !kept.nodes.has_captured());
    }

    /// Copies to the device, behind what is recorded.
    ///
    /// # Safety
    /// As [`Device::upload`].
    pub(super) unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        self.submit()?;
        // SAFETY: as the caller promises.
        unsafe { self.upload_ahead(from, to) }
    }

    /// Copies to the device, ahead of what is recorded and not yet submitted.
    ///
    /// # Safety
    /// As [`Device::upload`].
    pub(super) unsafe fn upload_ahead(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        let mut state = self.state();
        state.counts.uploads += 1;
        let limit = state.give(&*self.device, 1)?;
        // SAFETY: as the caller promises.
        unsafe { state.ferries.of(from.len()).upload(&*self.device, limit, from, to) }
    }

    /// Makes the pinned memory that what steps bring goes through.
    pub(super) fn pin_steps(&self) -> Result<(), KernelError> {
        self.state().ferries.pin_steps(&*self.device)
    }

    /// Copies to the device, behind what is recorded, bytes that `make` writes.
    ///
    /// # Safety
    /// As [`Device::upload`].
    pub(super) unsafe fn upload_made(
        &self,
        bytes: usize,
        to: u64,
        make: impl FnOnce(&mut [u8]) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        self.submit()?;
        let mut state = self.state();
        state.counts.uploads += 1;
        let limit = state.give(&*self.device, 1)?;
        // SAFETY: as the caller promises.
        unsafe { state.ferries.of(bytes).upload_made(&*self.device, limit, bytes, to, make) }
    }

    /// Copies from the device, behind what is recorded, and waits.
    ///
    /// # Safety
    /// The bytes at `from` are allocated.
    pub(super) unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        self.submit()?;
        let mut state = self.state();
        state.counts.downloads += 1;
        let limit = state.give(&*self.device, 1)?;
        // SAFETY: as the caller promises.
        unsafe { state.ferries.of(to.len()).download(&*self.device, limit, from, to)? };
        state.done = state.given;
        Ok(())
    }

    /// Copies from the device to pinned memory, behind what is recorded; does not wait.
    ///
    /// # Safety
    /// As [`Pinned::fetch`].
    pub(super) unsafe fn fetch(
        &self,
        from: u64,
        to: &mut dyn Pinned,
        at: usize,
        bytes: usize,
    ) -> Result<(), KernelError> {
        self.submit()?;
        let mut state = self.state();
        state.counts.downloads += 1;
        state.give(&*self.device, 1)?;
        // SAFETY: as the caller promises.
        unsafe { to.fetch(from, at, bytes) }
    }

    /// Gives an allocation back, behind what is recorded.
    ///
    /// # Safety
    /// As [`Device::free`].
    pub(super) unsafe fn free(&self, address: u64, bytes: usize) {
        // What fails here is kept, and said at the next call.
        let _ = self.submit();
        // SAFETY: as the caller promises; nothing recorded uses it any more.
        unsafe { self.device.free(address, bytes) };
    }
}

impl State {
    fn limit(&self) -> Limit {
        self.deadline.map_or(Limit::For(self.patience), Limit::Until)
    }

    /// Sees to it that the device takes so many launches or copies without waiting; returns how long anything may wait for them.
    fn give(&mut self, device: &dyn Device, launches: u64) -> Result<Limit, KernelError> {
        let limit = self.limit();
        if self.given - self.done + launches > AHEAD_MAX {
            until("finish", limit.deadline(), || device.is_idle())?;
            self.done = self.given;
        }
        self.given += launches;
        Ok(limit)
    }

    fn submit(&mut self, device: &dyn Device) -> Result<(), KernelError> {
        if let Some(error) = &self.failed {
            self.recorded.clear();
            return Err(error.clone());
        }
        if self.recorded.is_empty() {
            return Ok(());
        }
        let mut nodes = std::mem::take(&mut self.recorded);
        self.counts.submissions += 1;
        self.counts.nodes += nodes.len() as u64;
        let submitted = self.enqueue(device, &mut nodes);
        nodes.clear();
        self.recorded = nodes;
        submitted.inspect_err(|error| self.failed = Some(error.clone()))
    }

    fn enqueue(&mut self, device: &dyn Device, nodes: &mut Sequence) -> Result<(), KernelError> {
        let Some(mut kept) = self.graph_of(device, nodes) else { return self.one_by_one(device, nodes) };
        self.give(device, 1)?;
        // SAFETY: whoever recorded the nodes promised that they may run, and the graph's are these.
        match unsafe { kept.graph.launch() } {
            Ok(()) => {
                self.counts.graphs += 1;
                self.graphs.push(kept);
                Ok(())
            }
            // A graph that is refused, for want of memory as a rule, has done nothing.
            Err(error) => {
                self.give_up_graphs(error);
                self.one_by_one(device, &kept.nodes)
            }
        }
    }

    fn one_by_one(&mut self, device: &dyn Device, nodes: &Sequence) -> Result<(), KernelError> {
        self.give(device, nodes.len() as u64)?;
        // SAFETY: whoever recorded a node promised that it may run.
        nodes.nodes().try_for_each(|node| unsafe { node.enqueue(device) })
    }

    /// From here on nodes are launched one by one.
    fn give_up_graphs(&mut self, why: KernelError) {
        self.plain = true;
        self.graphs.clear();
        self.warning.get_or_insert(why);
    }

    /// A graph of these nodes, which it takes in exchange for others; `None` if they are to be launched one by one.
    fn graph_of(&mut self, device: &dyn Device, nodes: &mut Sequence) -> Option<Kept> {
        if self.plain || nodes.len() < NODES_MIN {
            return None;
        }
        let structure = nodes.structure();
        let Some((index, differences)) = self.nearest(structure, nodes) else {
            if self.seen.contains(&structure) {
                return self.instantiate(device, nodes, structure);
            }
            self.seen.truncate(SEEN_MAX - 1);
            self.seen.push_front(structure);
            return None;
        };
        // Where most nodes differ, it is a step of another size or another layer, which will come again too.
        let room = self.graphs.len() < GRAPHS_MAX && self.held() + nodes.weight() <= GRAPH_NODES_MAX;
        if differences.len() > nodes.len() / 2 && room {
            return self.instantiate(device, nodes, structure);
        }
        let mut kept = self.graphs.remove(index);
        match kept.update(nodes, &differences) {
            Ok(()) => {
                self.counts.updated += differences.len() as u64;
                Some(kept)
            }
            // What the graph would do now is not known.
            Err(error) => {
                drop(kept);
                self.warning.get_or_insert(error);
                self.instantiate(device, nodes, structure)
            }
        }
    }

    /// The graph of this structure with the fewest nodes to change, and which these are. The one not used for longest is looked
    /// at first: where layer after layer is submitted, it is the turn of its layer.
    fn nearest(&mut self, structure: u64, nodes: &Sequence) -> Option<(usize, Vec<usize>)> {
        let mut nearest: Option<(usize, Vec<usize>)> = None;
        let like = |kept: &Kept| kept.structure == structure && kept.nodes.is_like(nodes);
        for (index, kept) in self.graphs.iter().enumerate().filter(|(_, kept)| like(kept)) {
            self.counts.compared += 1;
            let most = nearest.as_ref().map_or(nodes.len(), |(_, differences)| differences.len());
            let differences: Vec<usize> = kept.nodes.differences(nodes).take(most + 1).collect();
            // Among equals the first.
            if nearest.as_ref().is_none_or(|_| differences.len() < most) {
                nearest = Some((index, differences));
            }
            if nearest.as_ref().is_some_and(|(_, differences)| differences.len() <= nodes.len() / 4) {
                break;
            }
        }
        nearest
    }

    fn instantiate(&mut self, device: &dyn Device, nodes: &mut Sequence, structure: u64) -> Option<Kept> {
        while self.graphs.len() >= GRAPHS_MAX || self.held() + nodes.weight() > GRAPH_NODES_MAX {
            self.graphs.remove(0);
            self.counts.evicted += 1;
        }
        let free = tracing::enabled!(tracing::Level::DEBUG).then(|| device.free_memory()).flatten();
        match device.graph(nodes) {
            Ok(graph) => {
                if let Some((before, after)) = free.zip(device.free_memory()) {
                    // Whatever else happened on the device meanwhile is in it.
                    let taken = before.saturating_sub(after);
                    tracing::debug!(nodes = nodes.len(), taken, "bytes of the GPU that a graph took");
                }
                self.counts.instantiated += 1;
                Some(Kept { graph, nodes: std::mem::take(nodes), structure })
            }
            Err(error) => {
                self.give_up_graphs(error);
                None
            }
        }
    }

    /// Nodes of all graphs.
    fn held(&self) -> usize {
        self.graphs.iter().map(|kept| kept.nodes.weight()).sum()
    }
}

impl Kept {
    /// Makes it a graph of `nodes`, which are like its own and differ from them at `differences`; takes them in exchange.
    fn update(&mut self, nodes: &mut Sequence, differences: &[usize]) -> Result<(), KernelError> {
        for &at in differences {
            let node = nodes.node(at);
            // SAFETY: the node is like the one at this place, and may run by the promise of whoever recorded it.
            unsafe { self.graph.update(at, node)? };
        }
        std::mem::swap(&mut self.nodes, nodes);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
