//! The queue over a device that shows what it did.

use super::*;
use crate::cuda::{Capture, Family, KERNELS, Pinned};

/// A device of a few hundred words that does one thing at once: a launch of kernel `k` on the word at `args[0]` makes
/// it `10 * word + k + args[1]`, so that order and arguments show.
#[derive(Debug, Default)]
struct Fake {
    memory: Arc<Mutex<Vec<u64>>>,
    /// Graphs that can still be made, and changes that can still be done.
    graphs: Option<usize>,
    changes: Option<usize>,
    made: Mutex<usize>,
    /// Graphs are made and not launched.
    no_launch: bool,
    /// A launch on this word fails.
    bad_word: Option<u64>,
}

#[derive(Debug)]
struct FakeGraph {
    memory: Arc<Mutex<Vec<u64>>>,
    nodes: Vec<Sequence>,
    changes: Option<usize>,
    no_launch: bool,
}

fn refused() -> KernelError {
    KernelError::Device { what: "do it", why: "planted".to_owned() }
}

impl Device for Fake {
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
        self.memory.lock().unwrap()[to as usize] = u64::from(from[0]);
        Ok(())
    }
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        to.copy_from_slice(&self.memory.lock().unwrap()[from as usize].to_le_bytes());
        Ok(())
    }
    unsafe fn copy(&self, from: u64, to: u64, _bytes: usize) -> Result<(), KernelError> {
        let mut memory = self.memory.lock().unwrap();
        memory[to as usize] = memory[from as usize];
        Ok(())
    }
    unsafe fn zero(&self, to: u64, _bytes: usize) -> Result<(), KernelError> {
        self.memory.lock().unwrap()[to as usize] = 0;
        Ok(())
    }
    unsafe fn launch(&self, launch: Launch<'_>, args: *const c_void, _bytes: usize) -> Result<(), KernelError> {
        // SAFETY: two words, by the tests below.
        let [at, add] = unsafe { args.cast::<[u64; 2]>().read() };
        if self.bad_word == Some(at) {
            return Err(refused());
        }
        let kernel = KERNELS.iter().position(|kernel| kernel == launch.kernel).unwrap() as u64;
        let word = &mut self.memory.lock().unwrap()[at as usize];
        *word = word.wrapping_mul(10).wrapping_add(kernel + add);
        Ok(())
    }
    fn pin(&self, _bytes: usize) -> Result<Box<dyn Pinned>, KernelError> {
        Err(refused())
    }
    fn graph(&self, nodes: &Sequence) -> Result<Box<dyn Graph>, KernelError> {
        let mut made = self.made.lock().unwrap();
        *made += 1;
        if self.graphs.is_some_and(|graphs| *made > graphs) {
            return Err(refused());
        }
        let alone = |node| {
            let mut sequence = Sequence::default();
            sequence.push(node);
            sequence
        };
        let nodes = nodes.nodes().map(alone).collect();
        Ok(Box::new(FakeGraph {
            memory: Arc::clone(&self.memory),
            nodes,
            changes: self.changes,
            no_launch: self.no_launch,
        }))
    }
}

impl Graph for FakeGraph {
    unsafe fn update(&mut self, at: usize, node: Node<'_>) -> Result<(), KernelError> {
        assert!(self.nodes[at].node(0).is_like(&node));
        self.changes = match self.changes {
            Some(0) => return Err(refused()),
            changes => changes.map(|left| left - 1),
        };
        self.nodes[at].clear();
        self.nodes[at].push(node);
        Ok(())
    }
    unsafe fn launch(&mut self) -> Result<(), KernelError> {
        if self.no_launch {
            return Err(refused());
        }
        let device = Fake { memory: Arc::clone(&self.memory), ..Fake::default() };
        // SAFETY: nodes of the fake device.
        self.nodes.iter().try_for_each(|nodes| unsafe { nodes.node(0).enqueue(&device) })
    }
}

const WORDS: usize = 600;

fn queue(device: Fake) -> Queue {
    *device.memory.lock().unwrap() = vec![0; WORDS];
    Queue::new(Arc::new(device))
}

/// Records launches of kernels in turn from `first` on, on consecutive words.
fn record(queue: &Queue, first: usize, count: usize, words: u64, add: u64) {
    for i in 0..count {
        let launch = Launch { kernel: &KERNELS[(first + i) % KERNELS.len()], grid: [1; 3], shared: 0 };
        let args = [words + i as u64, add];
        // SAFETY: two words, which the fake device reads.
        unsafe { queue.launch(launch, args.as_ptr().cast(), 16) }.unwrap();
    }
}

fn word(queue: &Queue, at: u64) -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: a word of the fake device.
    unsafe { queue.download(at, &mut bytes) }.unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn the_second_sight_makes_a_graph_and_later_ones_change_what_differs() {
    let queue = queue(Fake::default());
    for turn in 0..5 {
        record(&queue, 0, 6, 0, 1);
        // One node differs from turn to turn.
        record(&queue, 6, 1, 8, turn);
        queue.submit().unwrap();
    }
    let counts = queue.counts();
    assert_eq!((counts.submissions, counts.graphs, counts.nodes), (5, 4, 35));
    assert_eq!((counts.instantiated, counts.updated, counts.evicted), (1, 3, 0));
    // 6 + turn, turn after turn; kernel 2 with 1 added, five times.
    assert_eq!(word(&queue, 8), 67_900);
    assert_eq!(word(&queue, 2), 33_333);
}

#[test]
fn a_graph_that_is_not_launched_is_done_without() {
    let queue = queue(Fake { no_launch: true, ..Fake::default() });
    for _ in 0..4 {
        record(&queue, 0, 6, 0, 1);
        queue.submit().unwrap();
    }
    assert_eq!(word(&queue, 2), 3333, "everything was done, and once");
    assert_eq!((queue.counts().instantiated, queue.counts().graphs), (1, 0));
    assert!(queue.take_warning().is_some() && queue.take_warning().is_none(), "it is told once");
}

#[test]
fn what_is_lost_where_nobody_looks_is_said_ever_after() {
    let queue = queue(Fake { bad_word: Some(1), ..Fake::default() });
    record(&queue, 0, 3, 0, 1);
    // SAFETY: the fake device frees nothing. This submits what is recorded, and says nothing of it.
    unsafe { queue.free(500, 8) };
    for _ in 0..2 {
        assert!(queue.submit().is_err());
    }
    record(&queue, 0, 1, 0, 1);
    // SAFETY: a word of the fake device.
    assert!(unsafe { queue.download(0, &mut [0; 8]) }.is_err());
}

#[test]
fn order_is_kept_between_what_is_recorded_and_what_is_not() {
    let queue = queue(Fake::default());
    // SAFETY: words of the fake device.
    unsafe {
        queue.upload(&[7], 3).unwrap();
        record(&queue, 1, 1, 3, 0);
        queue.copy(3, 4, 8).unwrap();
        queue.upload(&[9], 3).unwrap();
        assert_eq!((word(&queue, 4), word(&queue, 3)), (71, 9));
        record(&queue, 1, 1, 3, 0);
        queue.upload_ahead(&[5], 4).unwrap();
        queue.zero(3, 8).unwrap();
        assert_eq!((word(&queue, 4), word(&queue, 3)), (5, 0));
    }
    let counts = queue.counts();
    assert_eq!((counts.uploads, counts.downloads, counts.submissions, counts.graphs), (3, 4, 2, 0));
}

#[test]
fn much_is_submitted_before_it_is_waited_for() {
    let queue = queue(Fake::default());
    record(&queue, 0, NODES_MAX, 0, 1);
    assert_eq!((queue.counts().submissions, queue.counts().nodes), (1, NODES_MAX as u64));
    record(&queue, 0, NODES_MAX - 1, 0, 1);
    assert_eq!(queue.counts().submissions, 1);
}

#[test]
fn sizes_that_come_again_have_graphs_of_their_own() {
    let queue = queue(Fake::default());
    for turn in 0..9 {
        // Three sizes in turn, in which every node differs.
        record(&queue, 0, 8, 0, 100 * (turn % 3));
        queue.submit().unwrap();
    }
    let counts = queue.counts();
    assert_eq!((counts.instantiated, counts.updated, counts.graphs), (3, 0, 8));
}

/// Layers of one structure and other weights, submitted one by one: each finds its own graph at once.
#[test]
fn layers_in_turn_are_compared_with_their_own_graphs() {
    let queue = queue(Fake::default());
    const LAYERS: u64 = 36;
    let step = || {
        for layer in 0..LAYERS {
            record(&queue, 0, 8, 0, 100 * layer);
            queue.submit().unwrap();
        }
        queue.counts()
    };
    step();
    let [before, after] = [step(), step()];
    assert_eq!((after.instantiated, after.updated), (LAYERS, 0));
    assert_eq!((after.graphs - before.graphs, after.compared - before.compared), (LAYERS, LAYERS));
}

#[test]
fn graphs_and_what_was_seen_are_bounded() {
    let queue = queue(Fake::default());
    let kernels = KERNELS.len();
    // Structures of their own: so many kernels, from a first one on.
    let structures = GRAPHS_MAX + 20;
    for structure in 0..structures {
        for _ in 0..2 {
            record(&queue, structure % kernels, 4 + structure / kernels, 0, 0);
            queue.submit().unwrap();
        }
    }
    let counts = queue.counts();
    assert_eq!((counts.instantiated, counts.evicted), (structures as u64, 20));
    assert_eq!(queue.state().graphs.len(), GRAPHS_MAX);
    // The last one is kept; the first one was given up, and is forgotten too.
    let graphs_after = |structure: usize| {
        record(&queue, structure % kernels, 4 + structure / kernels, 0, 0);
        queue.submit().unwrap();
        queue.counts().graphs - counts.graphs
    };
    assert_eq!([structures - 1, 0, 0].map(graphs_after), [1, 1, 2]);
    assert_eq!(queue.counts().instantiated, counts.instantiated + 1);
    for structure in 0..3 * SEEN_MAX {
        record(&queue, structure % kernels, 100 + structure / kernels, 0, 0);
        queue.submit().unwrap();
    }
    assert_eq!(queue.state().seen.len(), SEEN_MAX);
    assert!(queue.state().held() <= GRAPH_NODES_MAX);
}

#[test]
fn many_nodes_are_bounded_by_changing_graphs_in_full() {
    let queue = queue(Fake::default());
    let most = (GRAPH_NODES_MAX / (NODES_MAX - 1)) as u64;
    for size in 0..most + 10 {
        record(&queue, 0, NODES_MAX - 1, 0, size);
        queue.submit().unwrap();
    }
    let counts = queue.counts();
    assert_eq!((counts.instantiated, counts.evicted), (most, 0));
    // The first size was launched node by node.
    assert_eq!(counts.updated, 9 * (NODES_MAX as u64 - 1));
    let expected = (0..most + 10).fold(0u64, |word, size| word.wrapping_mul(10).wrapping_add(1 + size));
    assert_eq!(word(&queue, 1), expected);
}

/// With graphs that cannot be made, or not be changed, all is done as it was recorded, and said once.
#[test]
fn without_graphs_all_is_done_one_by_one() {
    let run = |device: Fake| {
        let queue = queue(device);
        for turn in 0..6 {
            record(&queue, 0, 6, 0, turn / 2);
            record(&queue, 3, 1, 2, turn);
            queue.submit().unwrap();
        }
        let words: Vec<u64> = (0..8).map(|at| word(&queue, at)).collect();
        (words, queue.counts(), [queue.take_warning(), queue.take_warning()])
    };
    let (expected, counts, warnings) = run(Fake::default());
    assert!(counts.graphs == 5 && warnings == [None, None]);
    let (words, counts, warnings) = run(Fake { graphs: Some(0), ..Fake::default() });
    assert_eq!((words, counts.graphs, warnings), (expected.clone(), 0, [Some(refused()), None]));
    // A graph that cannot be changed is made anew, and given up when that fails too.
    let (words, counts, warnings) = run(Fake { changes: Some(0), ..Fake::default() });
    assert_eq!((&words, counts.graphs, warnings), (&expected, 5, [Some(refused()), None]));
    assert!(counts.instantiated > 1 && counts.updated == 0);
    let (words, counts, warnings) = run(Fake { changes: Some(0), graphs: Some(1), ..Fake::default() });
    assert_eq!((words, counts.graphs, warnings), (expected, 1, [Some(refused()), None]));
}

/// What a library enqueued: it makes a word `10 * word + 9`.
#[derive(Debug)]
struct Library(Arc<Mutex<Vec<u64>>>, usize);

impl Capture for Library {
    unsafe fn launch(&self) -> Result<(), KernelError> {
        let word = &mut self.0.lock().unwrap()[self.1];
        *word = 10 * *word + 9;
        Ok(())
    }
}

#[test]
fn what_was_captured_keeps_its_place_within_graphs_until_it_is_forgotten() {
    let device = Fake::default();
    let memory = Arc::clone(&device.memory);
    let queue = queue(device);
    let captured = [1, 2].map(|at| Captured::new(Library(Arc::clone(&memory), at)));
    let turn = |captured: &Captured| {
        record(&queue, 1, 3, 0, 0);
        // SAFETY: it writes a word of the fake device.
        unsafe { queue.enqueue_captured(captured) }.unwrap();
        record(&queue, 0, 1, 1, 0);
    };
    for _ in 0..3 {
        turn(&captured[0]);
        queue.submit().unwrap();
    }
    // Kernel 2, the library, kernel 0; three times.
    assert_eq!(word(&queue, 1), 290_290_290);
    assert_eq!((queue.counts().instantiated, queue.counts().graphs), (1, 2));
    // Another call is another structure: no graph becomes one with it.
    turn(&captured[1]);
    queue.submit().unwrap();
    assert_eq!((queue.counts().instantiated, queue.counts().updated, queue.counts().graphs), (1, 0, 2));
    let before = word(&queue, 1);
    turn(&captured[0]);
    queue.forget_captured();
    assert!(queue.state().graphs.is_empty());
    queue.submit().unwrap();
    assert_eq!(word(&queue, 1), (before * 10 + 2) * 10, "all but the library's");
    assert_eq!(Arc::strong_count(&memory), 4, "the device, the test, and what was captured, twice: no graph holds it");
}
