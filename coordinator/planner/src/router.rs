//! Where a request goes: to whoever has the least to do before its first token, cached prefixes counted as done.
//!
//! The same rule picks a cell for a request and a rank within a cell. Looking at every place for every request
//! would cost too much, so two are compared: the least loaded, and the one that saw the longest part of the prompt.

use std::collections::{BTreeMap, VecDeque};

use crate::prefix::BlockHash;

/// Tokens that a sequence which lives somewhere counts for, beside those of its prompt still to be computed.
pub const SEQUENCE_TOKENS: u64 = 32;

/// Which place saw the blocks of a prompt last. Bounded: the oldest are forgotten first.
#[derive(Clone, Debug)]
pub struct Affinity {
    places: BTreeMap<BlockHash, (u32, u64)>,
    /// In the order of insertion, with stale entries among them.
    order: VecDeque<(BlockHash, u64)>,
    stamp: u64,
    capacity: usize,
}

impl Affinity {
    /// Remembers up to `capacity` blocks.
    #[must_use]
    pub const fn new(capacity: usize) -> Self {
        Self { places: BTreeMap::new(), order: VecDeque::new(), stamp: 0, capacity }
    }

    /// Blocks of `chain` went to `place`.
    pub fn remember(&mut self, chain: &[BlockHash], place: u32) {
        for &hash in chain {
            self.stamp += 1;
            self.places.insert(hash, (place, self.stamp));
            self.order.push_back((hash, self.stamp));
        }
        while self.order.len() > self.capacity {
            let Some((hash, stamp)) = self.order.pop_front() else { return };
            if self.places.get(&hash).is_some_and(|(_, last)| *last == stamp) {
                self.places.remove(&hash);
            }
        }
    }

    /// The place that saw the longest part of `chain`, and how many blocks that is.
    #[must_use]
    pub fn longest(&self, chain: &[BlockHash]) -> Option<(u32, usize)> {
        (0..chain.len()).rev().find_map(|i| self.places.get(&chain[i]).map(|(place, _)| (*place, i + 1)))
    }
}

/// What a cell carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Whether it takes requests.
    pub open: bool,
    /// Tokens it has yet to read, and [`SEQUENCE_TOKENS`] for each of its sequences.
    pub tokens: u64,
}

/// Picks a cell for each request.
#[derive(Clone, Debug)]
pub struct Router {
    seen: Affinity,
    block_size: u32,
}

impl Router {
    /// A router of cells with blocks of `block_size` tokens, which remembers up to `capacity` blocks.
    #[must_use]
    pub const fn new(block_size: u32, capacity: usize) -> Self {
        Self { seen: Affinity::new(capacity), block_size }
    }

    /// The cell for a prompt whose blocks hash to `chain` (see [`crate::prefix::chain`]), and remembers it; `None`
    /// if no cell is open. `loads` has one entry for each cell.
    pub fn choose(&mut self, chain: &[BlockHash], loads: &[Load]) -> Option<usize> {
        let open = (0..loads.len()).filter(|&cell| loads[cell].open);
        let emptiest = open.min_by_key(|&cell| (loads[cell].tokens, cell))?;
        let block = u64::from(self.block_size);
        let seen = self.seen.longest(chain).map(|(place, blocks)| (place as usize, blocks as u64 * block));
        let chosen = match seen {
            Some((place, cached)) if loads.get(place).is_some_and(|load| load.open) => {
                let saved = loads[place].tokens.saturating_sub(cached);
                if saved <= loads[emptiest].tokens { place } else { emptiest }
            }
            _ => emptiest,
        };
        self.seen.remember(chain, u32::try_from(chosen).unwrap_or(u32::MAX));
        Some(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(range: std::ops::Range<u64>) -> Vec<BlockHash> {
        range.map(BlockHash).collect()
    }

    fn open(tokens: u64) -> Load {
        Load { open: true, tokens }
    }

    #[test]
    fn a_prompt_goes_where_it_was_seen_unless_that_costs_more() {
        let mut router = Router::new(16, 100);
        let chain = hashes(0..10);
        assert_eq!(router.choose(&chain, &[open(5), open(4), open(9)]), Some(1));
        assert_eq!(router.choose(&chain, &[open(0), open(100), open(0)]), Some(1), "160 tokens are saved there");
        assert_eq!(router.choose(&chain, &[open(0), open(161), open(0)]), Some(0));
        assert_eq!(router.choose(&chain, &[open(0), open(0), open(0)]), Some(0), "it was there last");
    }

    #[test]
    fn a_closed_cell_gets_nothing() {
        let mut router = Router::new(16, 100);
        let chain = hashes(0..4);
        assert_eq!(router.choose(&chain, &[open(0), open(7)]), Some(0));
        assert_eq!(router.choose(&chain, &[Load::default(), open(7)]), Some(1));
        assert_eq!(router.choose(&chain, &[Load::default(); 2]), None);
        assert_eq!(router.choose(&[], &[]), None);
    }

    #[test]
    fn what_was_seen_is_bounded_and_the_oldest_is_forgotten() {
        let mut seen = Affinity::new(4);
        seen.remember(&hashes(0..3), 1);
        seen.remember(&hashes(0..2), 2);
        assert_eq!(seen.longest(&hashes(0..3)), Some((1, 3)));
        seen.remember(&hashes(8..10), 3);
        assert_eq!(seen.longest(&hashes(0..3)), Some((2, 2)), "block 2 is forgotten, 0 and 1 were renewed");
        assert!(seen.order.len() <= 4 && seen.places.len() <= 4);
    }
}
