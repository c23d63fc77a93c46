//! Paged KV memory of a rank: which block belongs to whom.
//!
//! A block is free, or cooling (nobody holds it any more, but a step under way may still write to it), or a sequence's
//! own, or in the prefix cache, where several sequences may hold it. A block that was given back while step `n` was
//! the last one planned is given to somebody else only after `n` is applied: so any step can be done again.
//!
//= arXiv:2309.06180 (PagedAttention)

use std::collections::{BTreeMap, VecDeque};

use phalanx_proto::{BlockGrant, BlockId, Limits, Pool, StepId, TokenId};

use crate::prefix::{BlockHash, Match, NodeId, PrefixCache};
use crate::work::Work;

/// The blocks of one pool that belong to nobody.
#[derive(Clone, Debug)]
pub struct FreeBlocks {
    free: Vec<BlockId>,
    /// Not before these steps are applied; ascending.
    cooling: VecDeque<(StepId, BlockId)>,
    total: u32,
}

impl FreeBlocks {
    /// All blocks free.
    #[must_use]
    pub fn new(total: u32) -> Self {
        Self { free: (0..total).rev().map(BlockId).collect(), cooling: VecDeque::new(), total }
    }

    /// Blocks that can be given away.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.free.len()
    }

    /// Blocks that can be given away once steps under way are applied.
    #[must_use]
    pub fn cooling(&self) -> usize {
        self.cooling.len()
    }

    /// Blocks in all.
    #[must_use]
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// Those that can be given away and those that cool.
    pub fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.free.iter().copied().chain(self.cooling.iter().map(|(_, block)| *block))
    }

    /// Takes a block back, to be used after `step`.
    fn give_back(&mut self, block: BlockId, step: StepId, applied: StepId) {
        if step <= applied {
            self.free.push(block);
        } else {
            self.cooling.push_back((step, block));
        }
    }

    /// Steps up to `applied` are applied. Returns whether blocks are ready that were not.
    fn cool(&mut self, applied: StepId) -> bool {
        let before = self.free.len();
        while let Some(&(step, block)) = self.cooling.front()
            && step <= applied
        {
            self.cooling.pop_front();
            self.free.push(block);
        }
        self.free.len() != before
    }
}

/// A block that a sequence holds in full layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The block.
    pub block: BlockId,
    /// The cached block that this is; `None` if it is the sequence's own.
    pub node: Option<NodeId>,
}

/// The blocks of one sequence.
#[derive(Clone, Debug, Default)]
pub struct BlockTable {
    /// In full layers, one for each stretch from the first on.
    full: Vec<Held>,
    /// In window layers, by stretch; `true` for the sequence's own.
    window: BTreeMap<u32, (BlockId, bool)>,
    /// Stretches cached so far, from the first on.
    published: u32,
    /// Whether stretches can still be cached: none after one that could not be.
    closed: bool,
}

impl BlockTable {
    /// The blocks in full layers.
    #[must_use]
    pub fn full(&self) -> &[Held] {
        &self.full
    }

    /// The blocks in window layers, and whether they are the sequence's own.
    pub fn window(&self) -> impl Iterator<Item = (u32, BlockId, bool)> + '_ {
        self.window.iter().map(|(stretch, (block, own))| (*stretch, *block, *own))
    }

    /// Stretches of full layers that `end` positions need beyond those held.
    #[must_use]
    pub fn lacks(&self, end: u32, block_size: u32) -> u32 {
        end.div_ceil(block_size).saturating_sub(count(self.full.len()))
    }
}

/// The KV memory of a rank.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Blocks for full layers that belong to nobody.
    pub full: FreeBlocks,
    /// Blocks for window layers that belong to nobody.
    pub window: FreeBlocks,
    /// Blocks kept for prompts that begin alike.
    pub cache: PrefixCache,
    /// The last step applied on this rank.
    pub applied: StepId,
    /// Blocks touched so far.
    pub work: Work,
    /// Whether blocks for full layers have come back since this was last set to false.
    pub(crate) returned: bool,
}

/// Positions of a step, and what is needed to find their blocks.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The first position.
    pub start: u32,
    /// One past the last.
    pub end: u32,
    /// Positions of a block.
    pub block_size: u32,
    /// Window of the sliding layers.
    pub window: u32,
}

impl Span {
    /// The stretches of window layers that the positions write or see.
    fn window_stretches(&self) -> std::ops::Range<u32> {
        (self.start + 1).saturating_sub(self.window) / self.block_size..self.end.div_ceil(self.block_size)
    }
}

/// There are too few blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Short {
    /// Steps under way will give some back: wait.
    ForNow,
    /// Nothing comes back by itself.
    Lasting,
}

impl Memory {
    /// Memory of which nothing is used.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            full: FreeBlocks::new(limits.full_blocks),
            window: FreeBlocks::new(limits.window_blocks),
            cache: PrefixCache::default(),
            applied: StepId(0),
            work: Work::default(),
            returned: false,
        }
    }

    /// Blocks for full layers that can be given to sequences, those that only the cache holds among them.
    #[must_use]
    pub fn available(&self) -> usize {
        self.full.ready() + self.cache.idle()
    }

    /// Blocks for full layers that come back if the sequences with these tables go, without those `found` for another;
    /// and how many were looked at.
    pub fn held_only_by<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>, found: &Match) -> (usize, usize) {
        let (mut own, mut looked_at) = (0, 0);
        let mut holders = BTreeMap::<NodeId, u32>::new();
        for held in tables.flat_map(BlockTable::full) {
            looked_at += 1;
            match held.node {
                Some(node) => *holders.entry(node).or_default() += 1,
                None => own += 1,
            }
        }
        found.nodes.iter().for_each(|node| _ = holders.remove(node));
        let alone = holders.iter().filter(|(node, holders)| self.cache.node(**node).users == **holders).count();
        (own + alone, looked_at)
    }

    /// Takes blocks for the positions of a span, evicting from the cache as needed; all of them or none. `planned` is
    /// the last step planned.
    ///
    /// # Errors
    /// There are too few.
    pub fn take(&mut self, table: &mut BlockTable, span: Span, planned: StepId) -> Result<Vec<BlockGrant>, Short> {
        let first = count(table.full.len());
        let full: Vec<u32> = (first..span.end.div_ceil(span.block_size)).collect();
        let window: Vec<u32> = span.window_stretches().filter(|stretch| !table.window.contains_key(stretch)).collect();
        self.work.touch_all(full.len() + window.len());
        self.make_room(full.len(), window.len(), planned)?;
        let mut grants = Vec::with_capacity(full.len() + window.len());
        for index in full {
            let block = self.full.free.pop().expect("`make_room` has made it");
            table.full.push(Held { block, node: None });
            grants.push(BlockGrant { pool: Pool::Full, index, block });
        }
        for index in window {
            let block = self.window.free.pop().expect("`make_room` has made it");
            table.window.insert(index, (block, true));
            grants.push(BlockGrant { pool: Pool::Window, index, block });
        }
        Ok(grants)
    }

    fn make_room(&mut self, full: usize, window: usize, planned: StepId) -> Result<(), Short> {
        while self.full.ready() < full {
            let Some((block, with_window)) = self.cache.evict(self.applied) else {
                let coming = self.full.cooling() + self.cache.idle() > 0;
                return Err(if coming { Short::ForNow } else { Short::Lasting });
            };
            self.work.touch();
            self.full.free.push(block);
            self.window.free.extend(with_window);
        }
        while self.window.ready() < window {
            let Some(block) = self.cache.evict_window(self.applied) else {
                // Windows move on with every step that is applied.
                return Err(if self.applied < planned { Short::ForNow } else { Short::Lasting });
            };
            self.work.touch();
            self.window.free.push(block);
        }
        Ok(())
    }

    /// Gives a new sequence what is cached of its prompt.
    pub fn adopt(&mut self, table: &mut BlockTable, found: &Match) -> Vec<BlockGrant> {
        let mut grants = Vec::with_capacity(found.nodes.len() * 2);
        for (index, &id) in (0..).zip(&found.nodes) {
            self.work.touch();
            self.cache.hold(id);
            let block = self.cache.node(id).full;
            table.full.push(Held { block, node: Some(id) });
            grants.push(BlockGrant { pool: Pool::Full, index, block });
            if index >= found.window_from
                && let Some(block) = self.cache.hold_window(id)
            {
                table.window.insert(index, (block, false));
                grants.push(BlockGrant { pool: Pool::Window, index, block });
            }
        }
        table.published = count(found.nodes.len());
        grants
    }

    /// The next stretch that a sequence could have cached, with the cached one before it, if `filled` positions are
    /// applied.
    #[must_use]
    pub fn publishable(&self, table: &BlockTable, filled: u32, block_size: u32) -> Option<(u32, Option<NodeId>)> {
        let stretch = table.published;
        if table.closed || (stretch + 1) * block_size > filled {
            return None;
        }
        let parent = stretch.checked_sub(1).and_then(|before| table.full[before as usize].node);
        Some((stretch, parent))
    }

    /// Caches a stretch named by [`Memory::publishable`], whose tokens these are. If the same is cached already, the
    /// sequence goes on with that block and gives its own back; the rank is to be told so with the grant returned.
    /// `step` is the last that may still use its own.
    pub fn publish(
        &mut self,
        table: &mut BlockTable,
        (stretch, parent): (u32, Option<NodeId>),
        hash: BlockHash,
        tokens: &[TokenId],
        step: StepId,
    ) -> Option<BlockGrant> {
        self.work.touch();
        let held = &mut table.full[stretch as usize];
        let Some(id) = self.cache.publish(parent, hash, tokens, held.block) else {
            table.closed = true;
            return None;
        };
        table.published += 1;
        let block = self.cache.node(id).full;
        let own = std::mem::replace(held, Held { block, node: Some(id) }).block;
        (own != block).then(|| {
            self.full.give_back(own, step, self.applied);
            BlockGrant { pool: Pool::Full, index: stretch, block }
        })
    }

    /// Gives back the window blocks that no row from position `next` on sees; to the cache where it can use them.
    /// `is_tail` says which stretches end a window that may be wanted again.
    pub fn retire(&mut self, table: &mut BlockTable, next: Span, is_tail: impl Fn(u32) -> bool) {
        let seen = next.window_stretches().start;
        while let Some((&stretch, _)) = table.window.first_key_value()
            && stretch < seen
        {
            // Every row that saw it is applied.
            self.drop_window(table, stretch, self.applied, &is_tail);
        }
    }

    fn drop_window(&mut self, table: &mut BlockTable, stretch: u32, step: StepId, is_tail: &impl Fn(u32) -> bool) {
        let Some((block, own)) = table.window.remove(&stretch) else { return };
        self.work.touch();
        let node = table.full.get(stretch as usize).and_then(|held| held.node);
        match node {
            Some(node) if !own => {
                self.cache.mark_tail(node, is_tail(stretch));
                self.cache.let_go_window(node, step);
            }
            Some(node) if self.cache.keep_window(node, block, is_tail(stretch), step) => {}
            _ => self.window.give_back(block, step, self.applied),
        }
    }

    /// Gives everything back. `step` is the last that may still use it.
    pub fn give_back(&mut self, table: &mut BlockTable, step: StepId, is_tail: impl Fn(u32) -> bool) {
        while let Some((&stretch, _)) = table.window.first_key_value() {
            self.drop_window(table, stretch, step, &is_tail);
        }
        // Last to first, so that no cached block is evicted after the one before it.
        for held in std::mem::take(&mut table.full).into_iter().rev() {
            self.work.touch();
            self.returned = true;
            match held.node {
                Some(node) => self.cache.let_go(node, step),
                None => self.full.give_back(held.block, step, self.applied),
            }
        }
        *table = BlockTable::default();
    }

    /// A step is applied: what cooled until then can be used.
    pub fn apply(&mut self, step: StepId) {
        self.applied = self.applied.max(step);
        self.returned |= self.full.cool(self.applied);
        self.window.cool(self.applied);
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("sequences are bounded by the context")
}
