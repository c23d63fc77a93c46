//! Who holds what.

use std::fmt;

use crate::ids::{ExpertId, ExpertSlot, LayerIdx, Rank};

/// How a cell divides a model: `ep` ranks share the experts; each is its own attention group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Ranks that share the experts.
    pub ep: u32,
    /// Lost ranks whose experts the others have room for.
    pub survive: u32,
}

/// Why a layout or placement is impossible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// A cell has from 1 to [`Layout::RANKS_MAX`] ranks.
    Ranks {
        /// Ranks asked for.
        ep: u32,
    },
    /// At least one rank must be left.
    Survive {
        /// Ranks asked for.
        ep: u32,
        /// Losses asked for.
        survive: u32,
    },
    /// An expert is placed nowhere, or outside the slots.
    Unplaced {
        /// The layer.
        layer: LayerIdx,
        /// The expert.
        expert: ExpertId,
    },
    /// Two experts share a slot.
    Doubled {
        /// The layer.
        layer: LayerIdx,
        /// The rank.
        rank: Rank,
        /// The slot.
        slot: ExpertSlot,
    },
    /// The table's size is not layers x experts.
    Size,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ranks { ep } => write!(f, "a cell of {ep} ranks: use 1 to {}", Layout::RANKS_MAX),
            Self::Survive { ep, survive } => {
                write!(f, "{ep} ranks cannot survive the loss of {survive}: use --survive {}", ep.saturating_sub(1))
            }
            Self::Unplaced { layer, expert } => write!(f, "layer {layer} expert {expert} is placed on no slot"),
            Self::Doubled { layer, rank, slot } => {
                write!(f, "layer {layer} rank {rank} slot {slot} holds two experts")
            }
            Self::Size => f.write_str("the placement table does not have one entry per layer and expert"),
        }
    }
}

impl std::error::Error for LayoutError {}

impl Layout {
    /// Most ranks of one cell.
    pub const RANKS_MAX: u32 = 1024;

    /// A layout of `ep` ranks with room for the experts of `survive` lost ones.
    ///
    /// # Errors
    /// No rank, too many ranks, or none left.
    pub const fn new(ep: u32, survive: u32) -> Result<Self, LayoutError> {
        if ep == 0 || ep > Self::RANKS_MAX {
            return Err(LayoutError::Ranks { ep });
        }
        if survive >= ep {
            return Err(LayoutError::Survive { ep, survive });
        }
        Ok(Self { ep, survive })
    }

    /// Expert slots of a rank in each layer: `ceil(E / (ep - survive))`.
    #[must_use]
    pub const fn slots(&self, experts: u32) -> u32 {
        experts.div_ceil(self.ep - self.survive)
    }

    /// The ranks, first to last.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.ep).map(Rank)
    }
}

/// Where each expert of each layer lives: (layer, expert) -> (rank, slot).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    experts: u32,
    /// `[layers * E]`.
    places: Vec<(Rank, ExpertSlot)>,
}

impl Placement {
    /// Consecutive experts on consecutive ranks, the first `E mod ep` ranks holding one more.
    #[must_use]
    pub fn contiguous(layers: u32, experts: u32, layout: Layout) -> Self {
        let (share, more) = (experts / layout.ep, experts % layout.ep);
        let of_layer = layout.ranks().flat_map(|rank| {
            let slots = share + u32::from(rank.0 < more);
            (0..slots).map(move |slot| (rank, ExpertSlot(slot)))
        });
        let of_layer: Vec<_> = of_layer.collect();
        Self { experts, places: (0..layers).flat_map(|_| of_layer.iter().copied()).collect() }
    }

    /// A placement from its table, `[layers * E]`.
    ///
    /// # Errors
    /// A table of the wrong size, a place outside the layout, or a slot used twice.
    pub fn from_table(
        layers: u32,
        experts: u32,
        layout: Layout,
        places: Vec<(Rank, ExpertSlot)>,
    ) -> Result<Self, LayoutError> {
        if places.len() != layers as usize * experts as usize || experts == 0 {
            return Err(LayoutError::Size);
        }
        let slots = layout.slots(experts);
        for (layer, of_layer) in (0..).map(LayerIdx).zip(places.chunks(experts as usize)) {
            let mut used = vec![false; (layout.ep * slots) as usize];
            for (expert, &(rank, slot)) in (0..).map(ExpertId).zip(of_layer) {
                if rank.0 >= layout.ep || slot.0 >= slots {
                    return Err(LayoutError::Unplaced { layer, expert });
                }
                if std::mem::replace(&mut used[(rank.0 * slots + slot.0) as usize], true) {
                    return Err(LayoutError::Doubled { layer, rank, slot });
                }
            }
        }
        Ok(Self { experts, places })
    }

    /// The whole table, `[layers * E]`.
    #[must_use]
    pub fn table(&self) -> &[(Rank, ExpertSlot)] {
        &self.places
    }

    /// Where each expert of `layer` lives, `[E]`.
    ///
    /// # Panics
    /// If there is no such layer.
    #[must_use]
    pub fn of_layer(&self, layer: LayerIdx) -> &[(Rank, ExpertSlot)] {
        let experts = self.experts as usize;
        &self.places[layer.index() * experts..][..experts]
    }

    /// The experts of `layer` that `rank` holds, with their slots.
    pub fn held_by(&self, layer: LayerIdx, rank: Rank) -> impl Iterator<Item = (ExpertId, ExpertSlot)> + '_ {
        (0..).map(ExpertId).zip(self.of_layer(layer)).filter(move |(_, place)| place.0 == rank).map(|(e, p)| (e, p.1))
    }

    /// Most experts of a layer that `rank` holds.
    #[must_use]
    pub fn slots_used(&self, rank: Rank) -> u32 {
        let held = self.places.chunks(self.experts as usize).map(|l| l.iter().filter(|p| p.0 == rank).count()).max();
        u32::try_from(held.unwrap_or(0)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_covers_every_expert_evenly_for_any_number_of_ranks() {
        for ep in 1..=12 {
            let layout = Layout::new(ep, 0).unwrap();
            let placement = Placement::contiguous(3, 8, layout);
            let again = Placement::from_table(3, 8, layout, placement.table().to_vec());
            assert_eq!(again.as_ref(), Ok(&placement), "ep {ep}");
            let used: Vec<u32> = layout.ranks().map(|r| placement.slots_used(r)).collect();
            assert_eq!(used.iter().sum::<u32>(), 8);
            assert!(used.iter().max().unwrap() - used.iter().min().unwrap() <= 1, "ep {ep}: {used:?}");
        }
    }

    #[test]
    fn a_slot_is_never_shared() {
        let layout = Layout::new(1, 0).unwrap();
        let twice = vec![(Rank(0), ExpertSlot(0)), (Rank(0), ExpertSlot(0))];
        let error = Placement::from_table(1, 2, layout, twice).unwrap_err();
        assert_eq!(error, LayoutError::Doubled { layer: LayerIdx(0), rank: Rank(0), slot: ExpertSlot(0) });
    }

    #[test]
    fn survivors_have_room() {
        assert_eq!(Layout::new(4, 1).unwrap().slots(128), 43);
        assert!(Layout::new(1, 1).is_err());
    }
}
