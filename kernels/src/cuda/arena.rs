//! Stretches of one allocation, taken and given back: first fit, neighbours joined.
//!
//! Who uses memory does so in the order of one stream, so what is given back can be taken at once.

use std::collections::BTreeMap;
use std::ops::Range;

/// Stretches begin at multiples of this.
pub(super) const ALIGNMENT: usize = 256;

/// An allocation and what of it can be taken.
#[derive(Debug)]
pub(super) struct Arena {
    range: Range<u64>,
    /// Where free stretches begin, and their bytes.
    free: BTreeMap<u64, u64>,
}

/// What a stretch of `bytes` takes.
const fn taken(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(ALIGNMENT as u64)
}

impl Arena {
    /// All of an allocation that begins at a multiple of [`ALIGNMENT`] and is one long.
    pub(super) fn new(address: u64, bytes: usize) -> Self {
        let bytes = bytes as u64;
        Self { range: address..address + bytes, free: BTreeMap::from([(address, bytes)]) }
    }

    /// The allocation.
    pub(super) const fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// A stretch of `bytes`, the first that is large enough; `None` if there is none.
    pub(super) fn take(&mut self, bytes: usize) -> Option<u64> {
        let need = taken(bytes);
        let (&address, &there) = self.free.iter().find(|&(_, &there)| there >= need)?;
        self.free.remove(&address);
        if there > need {
            self.free.insert(address + need, there - need);
        }
        Some(address)
    }

    /// Gives back a stretch that was taken with the same number of bytes.
    pub(super) fn give(&mut self, address: u64, bytes: usize) {
        let (mut start, mut end) = (address, address + taken(bytes));
        if let Some((&before, &there)) = self.free.range(..start).next_back()
            && before + there == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(there) = self.free.remove(&end) {
            end += there;
        }
        self.free.insert(start, end - start);
    }

    /// Free bytes in all, and in the longest stretch.
    pub(super) fn room(&self) -> (u64, u64) {
        (self.free.values().sum(), self.free.values().copied().max().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    const SIZE: usize = 1 << 20;

    fn arena() -> Arena {
        Arena::new(4096, SIZE)
    }

    #[test]
    fn what_is_given_back_is_whole_again() {
        let mut arena = arena();
        let taken: Vec<u64> = (0..4).map(|i| arena.take(1000 + i).unwrap()).collect();
        assert_eq!(taken, [4096, 5120, 6144, 7168]);
        // In the middle, at either side of it, and last the one that joins both ends.
        for i in [1, 3, 0, 2] {
            arena.give(taken[i], 1000 + i);
        }
        assert_eq!(arena.room(), (SIZE as u64, SIZE as u64));
        assert_eq!(arena.take(SIZE), Some(4096));
        assert_eq!(arena.take(1), None);
    }

    #[test]
    fn the_first_stretch_that_is_large_enough_is_taken() {
        let mut arena = arena();
        let first = arena.take(256).unwrap();
        let wide = arena.take(4096).unwrap();
        let _border = arena.take(1).unwrap();
        arena.give(first, 256);
        arena.give(wide, 4096);
        assert_eq!(arena.take(4352), Some(first), "neighbours are one");
        assert_eq!(arena.take(SIZE), None);
    }

    /// Against a list of what is taken: nothing overlaps, all is aligned and inside, and what can be taken is.
    #[test]
    fn stretches_never_overlap() {
        let mut arena = arena();
        let mut held: Vec<(u64, usize)> = Vec::new();
        for turn in 0..4000 {
            let random = |choice, n: usize| (uniform(7, choice, turn) * n as f64) as usize;
            if random(0, 5) < 2 && !held.is_empty() {
                let (address, bytes) = held.swap_remove(random(1, held.len()));
                arena.give(address, bytes);
            } else {
                let bytes = 1 + random(2, 1 << random(3, 17));
                let (_, longest) = arena.room();
                match arena.take(bytes) {
                    Some(address) => held.push((address, bytes)),
                    None => assert!(longest < bytes.next_multiple_of(ALIGNMENT) as u64),
                }
            }
            let mut sorted = held.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().all(|&(address, _)| address % ALIGNMENT as u64 == 0));
            assert!(sorted.windows(2).all(|pair| pair[0].0 + pair[0].1 as u64 <= pair[1].0));
            assert!(sorted.last().is_none_or(|last| last.0 + last.1 as u64 <= (4096 + SIZE) as u64));
            let used: u64 = held.iter().map(|&(_, bytes)| taken(bytes)).sum();
            assert_eq!(arena.room().0 + used, SIZE as u64);
        }
        assert!(held.len() > 5);
    }
}
