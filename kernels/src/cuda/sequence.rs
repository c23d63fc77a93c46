//! What a device is to do next, as values: launches with their arguments, copies, zeros, what libraries enqueue; in order.

use std::ffi::c_void;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::device::{Captured, Device, Launch};
use super::ops::Kernel;
use super::queue::CAPTURED_NODES;
use crate::KernelError;

/// One thing that a device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node<'a> {
    /// Runs a kernel with the words of its argument struct.
    Launch(Launch<'a>, &'a [u64]),
    /// Copies on the device.
    Copy {
        /// Address.
        from: u64,
        /// Address.
        to: u64,
        /// Not 0.
        bytes: usize,
    },
    /// Sets bytes to zero.
    Zero {
        /// Address.
        to: u64,
        /// Not 0.
        bytes: usize,
    },
    /// Does what was captured.
    Captured(&'a Captured),
}

impl Node<'_> {
    /// Whether one can become the other by other numbers: both run the same kernel, or both copy, or both zero. What was
    /// captured becomes nothing else.
    #[must_use]
    pub fn is_like(&self, other: &Node<'_>) -> bool {
        match (self, other) {
            (Self::Launch(one, _), Node::Launch(other, _)) => one.kernel == other.kernel,
            (Self::Copy { .. }, Node::Copy { .. }) | (Self::Zero { .. }, Node::Zero { .. }) => true,
            (Self::Captured(one), Node::Captured(other)) => one == other,
            _ => false,
        }
    }

    /// Enqueues it by itself.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    ///
    /// # Safety
    /// As [`Device::launch`], [`Device::copy`], [`Device::zero`] and [`Capture::launch`](super::Capture::launch).
    pub unsafe fn enqueue(&self, device: &dyn Device) -> Result<(), KernelError> {
        // SAFETY: as the caller promises.
        unsafe {
            match *self {
                Self::Launch(launch, args) => device.launch(launch, args.as_ptr().cast(), size_of_val(args)),
                Self::Copy { from, to, bytes } => device.copy(from, to, bytes),
                Self::Zero { to, bytes } => device.zero(to, bytes),
                Self::Captured(captured) => captured.launch(),
            }
        }
    }
}

/// Nodes in their order; owns all that they hold.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    entries: Vec<Entry>,
    /// Arguments of all launches, one after the other.
    words: Vec<u64>,
}

#[derive(Clone, Debug)]
enum Entry {
    Launch { kernel: Kernel, grid: [u32; 3], shared: u32, first: usize, count: usize },
    Copy { from: u64, to: u64, bytes: usize },
    Zero { to: u64, bytes: usize },
    Captured(Captured),
}

impl Sequence {
    /// Nodes in it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Nodes of a graph of it, by count or estimate.
    pub(super) fn weight(&self) -> usize {
        let captured = self.entries.iter().filter(|entry| matches!(entry, Entry::Captured(_))).count();
        self.len() + captured * (CAPTURED_NODES - 1)
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Forgets the nodes and keeps their room.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.words.clear();
    }

    /// Appends a launch, whose arguments are copied.
    ///
    /// # Safety
    /// `args` points to `args_bytes` bytes without padding, a multiple of 8.
    pub(super) unsafe fn push_launch(&mut self, launch: Launch<'_>, args: *const c_void, args_bytes: usize) {
        let (first, count) = (self.words.len(), args_bytes / size_of::<u64>());
        self.words.resize(first + count, 0);
        let words = self.words[first..].as_mut_ptr();
        // SAFETY: the caller promises as many initialized bytes; the words were just made for them.
        unsafe { words.cast::<u8>().copy_from_nonoverlapping(args.cast(), count * size_of::<u64>()) };
        let Launch { kernel, grid, shared } = launch;
        self.entries.push(Entry::Launch { kernel: *kernel, grid, shared, first, count });
    }

    /// Forgets what was captured; the nodes before and behind it stay.
    pub(super) fn forget_captured(&mut self) {
        self.entries.retain(|entry| !matches!(entry, Entry::Captured(_)));
    }

    /// Whether something in it was captured.
    pub(super) fn has_captured(&self) -> bool {
        self.entries.iter().any(|entry| matches!(entry, Entry::Captured(_)))
    }

    /// Appends a node.
    pub fn push(&mut self, node: Node<'_>) {
        match node {
            Node::Launch(Launch { kernel, grid, shared }, args) => {
                let (first, count) = (self.words.len(), args.len());
                self.words.extend_from_slice(args);
                self.entries.push(Entry::Launch { kernel: *kernel, grid, shared, first, count });
            }
            Node::Copy { from, to, bytes } => self.entries.push(Entry::Copy { from, to, bytes }),
            Node::Zero { to, bytes } => self.entries.push(Entry::Zero { to, bytes }),
            Node::Captured(captured) => self.entries.push(Entry::Captured(captured.clone())),
        }
    }

    /// The nodes.
    pub fn nodes(&self) -> impl Iterator<Item = Node<'_>> {
        (0..self.len()).map(|at| self.node(at))
    }

    /// The node at a place below [`Sequence::len`].
    pub(super) fn node(&self, at: usize) -> Node<'_> {
        match self.entries[at] {
            Entry::Launch { ref kernel, grid, shared, first, count } => {
                Node::Launch(Launch { kernel, grid, shared }, &self.words[first..first + count])
            }
            Entry::Copy { from, to, bytes } => Node::Copy { from, to, bytes },
            Entry::Zero { to, bytes } => Node::Zero { to, bytes },
            Entry::Captured(ref captured) => Node::Captured(captured),
        }
    }

    /// A number that is the same for sequences of like nodes.
    pub(super) fn structure(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for entry in &self.entries {
            match entry {
                Entry::Launch { kernel, .. } => kernel.name.hash(&mut hasher),
                Entry::Copy { .. } => 1u8.hash(&mut hasher),
                Entry::Zero { .. } => 2u8.hash(&mut hasher),
                Entry::Captured(captured) => captured.hash(&mut hasher),
            }
        }
        hasher.finish()
    }

    /// Whether every node is like the other's at its place.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.len() == other.len() && self.nodes().zip(other.nodes()).all(|(one, other)| one.is_like(&other))
    }

    /// Places where the other has another node.
    pub(super) fn differences(&self, other: &Self) -> impl Iterator<Item = usize> {
        self.nodes().zip(other.nodes()).enumerate().filter(|(_, (one, other))| one != other).map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::KERNELS;

    fn sequence(args: [u64; 2], bytes: usize) -> Sequence {
        let mut sequence = Sequence::default();
        let launch = Launch { kernel: &KERNELS[1], grid: [1, 2, 3], shared: 4 };
        sequence.push(Node::Zero { to: 16, bytes });
        // SAFETY: two words.
        unsafe { sequence.push_launch(launch, args.as_ptr().cast(), 16) };
        sequence.push(Node::Launch(Launch { kernel: &KERNELS[0], ..launch }, &[9]));
        sequence.push(Node::Copy { from: 1, to: 2, bytes: 3 });
        sequence
    }

    #[test]
    fn nodes_come_back_as_they_were() {
        let sequence = sequence([5, 6], 7);
        let launch = Launch { kernel: &KERNELS[1], grid: [1, 2, 3], shared: 4 };
        let expected = [
            Node::Zero { to: 16, bytes: 7 },
            Node::Launch(launch, &[5, 6]),
            Node::Launch(Launch { kernel: &KERNELS[0], ..launch }, &[9]),
            Node::Copy { from: 1, to: 2, bytes: 3 },
        ];
        assert_eq!(sequence.nodes().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn structure_is_of_kernels_and_kinds_alone() {
        let one = sequence([5, 6], 7);
        let other = sequence([5, 8], 9);
        assert!(one.is_like(&other) && one.structure() == other.structure());
        assert_eq!(one.differences(&other).collect::<Vec<_>>(), [0, 1]);
        let mut longer = other.clone();
        longer.push(Node::Zero { to: 0, bytes: 1 });
        assert!(!one.is_like(&longer) && one.structure() != longer.structure());
        let (mut copies, mut zeros) = (one.clone(), one.clone());
        copies.push(Node::Copy { from: 0, to: 8, bytes: 1 });
        zeros.push(Node::Zero { to: 0, bytes: 1 });
        assert!(!copies.is_like(&zeros) && copies.structure() != zeros.structure());
    }
}
