//! Which keys and values are kept for prompts that begin alike.
//!
//! A full block is known by the hash of its tokens and of all before them, salted by what must not be shared. A hash
//! only finds a block: its tokens and the block before it are compared, so a collision is a miss and never a
//! wrong answer. Blocks that no sequence holds stay until their room is needed; the one unused longest goes first, and
//! as a sequence lets go of its blocks last to first, no block outlives the one before it.
//!
//! A row at block boundary `P` also needs the window layers' blocks that cover the window before `P`. Those of ends of
//! prompts, of ends of answers and of every 2048 tokens (tails) are kept before others.

use std::collections::{BTreeMap, BTreeSet};

use phalanx_proto::{BlockId, StepId, TokenId};

/// The hash of a block's tokens and of all before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub u64);

impl BlockHash {
    /// The hash before the first block of requests of one salt, under one arithmetic.
    #[must_use]
    pub const fn root(salt: u64, numerics: u64) -> Self {
        Self(mix(mix(numerics ^ 0x9e37_79b9_7f4a_7c15) ^ salt))
    }

    /// The hash of the block after this one.
    #[must_use]
    pub fn then(self, tokens: &[TokenId]) -> Self {
        Self(tokens.iter().fold(self.0, |hash, token| mix(hash ^ (u64::from(token.0) + 1))))
    }
}

/// The finaliser of splitmix64: every bit of the input moves every bit of the output.
//= https://doi.org/10.1145/2714064.2660195 (SplittableRandom)
const fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The hashes of the whole blocks of `tokens`, each of the block and all before it.
#[must_use]
pub fn chain(tokens: &[TokenId], block_size: u32, root: BlockHash) -> Vec<BlockHash> {
    let mut hash = root;
    let hashes = tokens.chunks_exact(block_size as usize).map(|block| {
        hash = hash.then(block);
        hash
    });
    hashes.collect()
}

/// Names a cached block of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

/// A cached block.
#[derive(Clone, Debug)]
pub struct Node {
    hash: BlockHash,
    /// The block before it; `None` for a first one.
    parent: Option<NodeId>,
    tokens: Box<[TokenId]>,
    /// Its keys and values in full layers,
    pub(crate) full: BlockId,
    /// and in window layers, as long as they are kept.
    pub(crate) window: Option<BlockId>,
    /// Sequences that hold it,
    pub(crate) users: u32,
    /// and those that hold its window block.
    pub(crate) window_users: u32,
    tail: bool,
    idle: Idle,
    window_idle: Idle,
}

/// Since when nobody holds something: its place in the order of eviction, and the last step that may still read it.
#[derive(Clone, Copy, Debug, Default)]
struct Idle {
    stamp: u64,
    step: StepId,
}

/// How much of a prompt is cached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The blocks that can be used, from the first on.
    pub nodes: Vec<NodeId>,
    /// The first of them whose window block is needed, too.
    pub window_from: u32,
    /// Those among them that nobody holds.
    pub idle: u32,
}

/// The cached blocks of a rank.
#[derive(Clone, Debug, Default)]
pub struct PrefixCache {
    nodes: BTreeMap<NodeId, Node>,
    by_hash: BTreeMap<BlockHash, NodeId>,
    /// Nodes that nobody holds, the one to go first at the front.
    idle: BTreeSet<(u64, NodeId)>,
    /// Window blocks that nobody holds; tails behind all others.
    window_idle: BTreeSet<(bool, u64, NodeId)>,
    next: u64,
    stamp: u64,
}

impl PrefixCache {
    /// Blocks for full layers that only the cache holds.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Blocks for window layers that only the cache holds.
    #[must_use]
    pub fn window_idle(&self) -> usize {
        self.window_idle.len()
    }

    /// All cached blocks.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        self.nodes.get(&id).expect("whoever names a node holds it, and held nodes stay")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes.get_mut(&id).expect("whoever names a node holds it, and held nodes stay")
    }

    fn child(&self, parent: Option<NodeId>, hash: BlockHash, tokens: &[TokenId]) -> Option<NodeId> {
        let id = *self.by_hash.get(&hash)?;
        let node = &self.nodes[&id];
        (node.parent == parent && *node.tokens == *tokens).then_some(id)
    }

    /// The longest prefix of `tokens` that can be used: whole blocks, at least one token left to compute, and window
    /// blocks before its end. `hashes` are the hashes of the blocks. O(blocks).
    #[must_use]
    pub fn find(&self, tokens: &[TokenId], hashes: &[BlockHash], block_size: u32, window: u32) -> Match {
        let mut found: Vec<NodeId> = Vec::new();
        let (mut usable, mut window_from, mut with_window) = (0, 0, 0u32);
        let whole = tokens[..tokens.len().saturating_sub(1)].chunks_exact(block_size as usize);
        for (block, &hash) in whole.zip(hashes) {
            let Some(id) = self.child(found.last().copied(), hash, block) else { break };
            found.push(id);
            with_window = if self.nodes[&id].window.is_some() { with_window + 1 } else { 0 };
            let blocks = u32::try_from(found.len()).expect("sequences are bounded by the context");
            let first = (blocks * block_size + 1).saturating_sub(window) / block_size;
            if with_window >= blocks - first {
                (usable, window_from) = (found.len(), first);
            }
        }
        found.truncate(usable);
        let idle = found.iter().filter(|id| self.nodes[id].users == 0).count();
        Match { idle: u32::try_from(idle).expect("as above"), nodes: found, window_from }
    }

    /// A sequence holds a block from now on.
    pub fn hold(&mut self, id: NodeId) {
        let node = self.node_mut(id);
        node.users += 1;
        if node.users == 1 {
            let stamp = node.idle.stamp;
            self.idle.remove(&(stamp, id));
        }
    }

    /// A sequence holds the window block of a block that it holds, and gets its number.
    pub fn hold_window(&mut self, id: NodeId) -> Option<BlockId> {
        let node = self.node_mut(id);
        let block = node.window?;
        node.window_users += 1;
        if node.window_users == 1 {
            let key = (node.tail, node.window_idle.stamp, id);
            self.window_idle.remove(&key);
        }
        Some(block)
    }

    /// A sequence lets go of a block. `step` is the last that may still read it.
    pub fn let_go(&mut self, id: NodeId, step: StepId) {
        self.stamp += 1;
        let stamp = self.stamp;
        let node = self.node_mut(id);
        node.users -= 1;
        if node.users == 0 {
            node.idle = Idle { stamp, step };
            self.idle.insert((stamp, id));
        }
    }

    /// A sequence lets go of a window block. `step` is the last that may still read it.
    pub fn let_go_window(&mut self, id: NodeId, step: StepId) {
        let node = self.node_mut(id);
        node.window_users -= 1;
        if node.window_users == 0 {
            self.window_unused(id, step);
        }
    }

    fn window_unused(&mut self, id: NodeId, step: StepId) {
        self.stamp += 1;
        let stamp = self.stamp;
        let node = self.node_mut(id);
        node.window_idle = Idle { stamp, step };
        let key = (node.tail, stamp, id);
        self.window_idle.insert(key);
    }

    /// Caches a block that its sequence has filled and goes on holding; if the same is cached already, that one is held.
    /// `None` if another block is in the way, which has the same hash.
    pub fn publish(
        &mut self,
        parent: Option<NodeId>,
        hash: BlockHash,
        tokens: &[TokenId],
        block: BlockId,
    ) -> Option<NodeId> {
        if let Some(id) = self.child(parent, hash, tokens) {
            self.hold(id);
            return Some(id);
        }
        if self.by_hash.contains_key(&hash) {
            return None;
        }
        let id = NodeId(self.next);
        self.next += 1;
        self.by_hash.insert(hash, id);
        let node = Node {
            hash,
            parent,
            tokens: tokens.into(),
            full: block,
            window: None,
            users: 1,
            window_users: 0,
            tail: false,
            idle: Idle::default(),
            window_idle: Idle::default(),
        };
        self.nodes.insert(id, node);
        Some(id)
    }

    /// Takes a window block that a sequence is done with into the cache; `false` if there is one already.
    pub fn keep_window(&mut self, id: NodeId, block: BlockId, tail: bool, step: StepId) -> bool {
        if self.node(id).window.is_some() {
            self.mark_tail(id, tail);
            return false;
        }
        let node = self.node_mut(id);
        (node.window, node.tail) = (Some(block), tail);
        self.window_unused(id, step);
        true
    }

    /// The window block of a node is a tail from now on, if `tail`.
    pub fn mark_tail(&mut self, id: NodeId, tail: bool) {
        let node = self.node_mut(id);
        if tail && !node.tail {
            let (before, idle) = ((false, node.window_idle.stamp, id), node.window.is_some() && node.window_users == 0);
            node.tail = true;
            if idle && self.window_idle.remove(&before) {
                self.window_idle.insert((true, before.1, id));
            }
        }
    }

    /// Evicts the block unused longest, if no step later than `applied` may read it. Returns its blocks for full
    /// layers and, if it had one, for window layers.
    pub fn evict(&mut self, applied: StepId) -> Option<(BlockId, Option<BlockId>)> {
        let &(stamp, id) = self.idle.first()?;
        if self.nodes[&id].idle.step > applied {
            return None;
        }
        self.idle.remove(&(stamp, id));
        let node = self.nodes.remove(&id)?;
        self.by_hash.remove(&node.hash);
        if node.window.is_some() {
            self.window_idle.remove(&(node.tail, node.window_idle.stamp, id));
        }
        Some((node.full, node.window))
    }

    /// Evicts the window block unused longest, tails last, if no step later than `applied` may read it.
    pub fn evict_window(&mut self, applied: StepId) -> Option<BlockId> {
        let &key = self.window_idle.first()?;
        let id = key.2;
        if self.nodes[&id].window_idle.step > applied {
            return None;
        }
        self.window_idle.remove(&key);
        let node = self.node_mut(id);
        node.tail = false;
        node.window.take()
    }

    /// What must hold.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (id, node) in &self.nodes {
            let idle = self.idle.contains(&(node.idle.stamp, *id));
            if idle != (node.users == 0) {
                return Err(format!("cached {id:?} has {} users, but idle is {idle}", node.users));
            }
            let kept = node.window.is_some() && node.window_users == 0;
            if self.window_idle.contains(&(node.tail, node.window_idle.stamp, *id)) != kept {
                return Err(format!("the window block of cached {id:?} is in the wrong order"));
            }
            if node.window_users > node.users {
                return Err(format!("cached {id:?} has more users of its window block than of itself"));
            }
            if let Some(parent) = node.parent {
                match self.nodes.get(&parent) {
                    Some(parent) if parent.users >= u32::from(node.users > 0) => {}
                    Some(_) => return Err(format!("cached {id:?} is held, the one before it is not")),
                    None => return Err(format!("cached {id:?} outlived the one before it")),
                }
            }
            if self.by_hash.get(&node.hash) != Some(id) {
                return Err(format!("cached {id:?} cannot be found"));
            }
        }
        let sizes = (self.by_hash.len(), self.nodes.len());
        if sizes.0 != sizes.1 { Err(format!("{} hashes for {} cached blocks", sizes.0, sizes.1)) } else { Ok(()) }
    }
}
