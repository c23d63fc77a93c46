//! Which way the rows of a step travel: a function of what every rank knows, so that all choose alike without a word.

use phalanx_kernels::cuda::{SLOT_HEADER, Slot};
use phalanx_model::{Exchange, ExchangeKind};

/// The fewest rows that slots are made for; above, powers of two.
const BUCKET_MIN: u32 = 8;
/// Slots of a layer that a rank sends, at most: more bytes take longer than the host's round trips for the true sizes.
/// Not measured yet.
const LAYER_BYTES_MAX: usize = 16 << 20;
/// Slots that a rank sends in one exchange, at most, its own one included: with one other rank it is every second.
pub const SLOTS_BYTES_MAX: usize = 2 * LAYER_BYTES_MAX;

/// How the rows of a step travel. What arrives is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// As many bytes as there are; each rank learns the sizes first, on the host.
    Exact,
    /// In slots with room for `rows` rows of each rank to each other, whatever experts they choose.
    Slots {
        /// The step's bucket.
        rows: u32,
    },
    /// The same, but every rank gets every row of all and picks its own; results come back in slots.
    Gather {
        /// The step's bucket.
        rows: u32,
    },
}

/// What decides it, the same on all ranks of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Ranks.
    pub ranks: usize,
    /// Experts of a layer, `E`.
    pub experts: usize,
    /// Experts of a row, `K`.
    pub top_k: usize,
    /// Bytes of a row on its way to an expert, and of a result on its way back.
    pub row_bytes: [usize; 2],
    /// Most rows of a rank in a step.
    pub rows_max: u32,
    /// Bytes from all ranks that there is room for.
    pub room: usize,
}

impl Shape {
    /// The way of a step with so many rows on each rank, `[ranks]`.
    #[must_use]
    pub fn way(&self, rows_of_rank: &[u32]) -> Way {
        if rows_of_rank.len() != self.ranks {
            return Way::Exact;
        }
        let most = rows_of_rank.iter().max().copied().unwrap_or(0);
        let rows = most.checked_next_power_of_two().unwrap_or(u32::MAX).max(BUCKET_MIN);
        if most > self.rows_max || !self.has_slots(rows) {
            Way::Exact
        } else if self.gathers() {
            Way::Gather { rows }
        } else {
            Way::Slots { rows }
        }
    }

    /// Whether a bucket's slots have room and are worth their bytes.
    fn has_slots(&self, rows: u32) -> bool {
        let strides = self.strides(rows);
        let of = |ranks: usize, stride: usize| ranks.saturating_mul(stride);
        let sent =
            strides.iter().fold(0_usize, |sum, &stride| sum.saturating_add(of(self.ranks.saturating_sub(1), stride)));
        sent <= LAYER_BYTES_MAX && strides.iter().all(|&stride| of(self.ranks, stride) <= self.room)
    }

    /// Bytes of a slot there and of one back.
    fn strides(&self, rows: u32) -> [usize; 2] {
        [ExchangeKind::Dispatch, ExchangeKind::Combine].map(|kind| self.payload(rows, kind).saturating_add(SLOT_HEADER))
    }

    /// Bytes of a slot's payload: all rows of a rank, or all their results, go to one other.
    fn payload(&self, rows: u32, kind: ExchangeKind) -> usize {
        let [there, back] = self.row_bytes;
        let each = match kind {
            ExchangeKind::Dispatch => there,
            ExchangeKind::Combine => self.top_k.saturating_mul(back),
        };
        (rows as usize).saturating_mul(each).checked_next_multiple_of(16).unwrap_or(usize::MAX)
    }

    /// Whether a row visits at least half of the ranks on average, if it chooses evenly: slots have to have room for all
    /// rows either way, so gathered rows are no more bytes, and are written once instead of once for each rank; but every
    /// rank looks at all of them.
    fn gathers(&self) -> bool {
        // A rank is passed by if all K experts of a row are among those it does not hold: of E (E-1) .. ordered choices,
        // (E-e) (E-e-1) .. pass it by.
        let elsewhere = self.experts - self.experts / self.ranks.max(1);
        let choices = |from: usize| (0..self.top_k).map(|k| from.saturating_sub(k) as f64).product::<f64>();
        self.ranks > 1 && 2.0 * choices(elsewhere) <= choices(self.experts)
    }

    /// The largest bucket that has slots, 0 if none has.
    fn bucket_max(&self) -> u32 {
        let largest = self.rows_max.checked_next_power_of_two().unwrap_or(u32::MAX).max(BUCKET_MIN);
        let buckets = std::iter::successors(Some(BUCKET_MIN), |rows| rows.checked_mul(2));
        buckets.take_while(|&rows| rows <= largest && self.has_slots(rows)).last().unwrap_or(0)
    }

    /// Bytes of all slots that a rank sends in one exchange, at most.
    #[must_use]
    pub fn slots_bytes(&self) -> usize {
        let bucket = self.bucket_max();
        if bucket == 0 { 0 } else { self.strides(bucket).into_iter().max().unwrap_or(0) * self.ranks }
    }

    /// The slots of an exchange of a step that goes this way; none if it goes the exact way.
    #[must_use]
    pub fn slot(&self, way: Way, exchange: Exchange) -> Option<Slot> {
        let (Way::Slots { rows } | Way::Gather { rows }) = way else { return None };
        let Exchange { layer, kind, row_bytes } = exchange;
        let number = layer.0.wrapping_mul(2) + u32::from(kind == ExchangeKind::Combine);
        Some(Slot { bytes: self.payload(rows, kind), row_bytes, exchange: number })
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::LayerIdx;
    use proptest::prelude::*;

    use super::*;

    /// gpt-oss-120b in fast precision.
    fn shape(ranks: usize) -> Shape {
        let (row_bytes, rows_max) = ([16 + 5760, 5760], 2048);
        Shape { ranks, experts: 128, top_k: 4, row_bytes, rows_max, room: ranks * 2048 * row_bytes[0] }
    }

    #[test]
    fn decode_takes_slots_and_prefill_does_not() {
        assert_eq!(shape(2).way(&[1, 0]), Way::Gather { rows: 8 });
        assert_eq!(shape(4).way(&[64, 3, 64, 0]), Way::Gather { rows: 64 });
        assert_eq!(shape(4).way(&[65, 3, 64, 0]), Way::Gather { rows: 128 });
        assert_eq!(shape(8).way(&[64; 8]), Way::Slots { rows: 64 });
        assert_eq!(shape(8).way(&[0, 0, 0, 0, 0, 0, 0, 2048]), Way::Exact);
        assert_eq!(shape(8).way(&[2049; 8]), Way::Exact);
        // One rank has nobody to send to, and no host round trip to save either: its own part stays.
        assert_eq!(shape(1).way(&[64]), Way::Slots { rows: 64 });
    }

    #[test]
    fn what_was_not_said_of_every_rank_decides_nothing() {
        assert_eq!(shape(4).way(&[1; 3]), Way::Exact);
        assert_eq!(shape(4).way(&[]), Way::Exact);
        assert_eq!(shape(2).way(&[u32::MAX; 2]), Way::Exact);
    }

    /// 1 - C(E - E/N, K) / C(E, K) is the chance of a rank to be visited: 0.68 of 4 ranks, 0.42 of 8.
    #[test]
    fn rows_are_gathered_where_they_visit_half_of_the_ranks() {
        let gathered = |ranks| shape(ranks).gathers();
        assert_eq!(
            [1, 2, 3, 4, 5, 6, 7, 8, 16].map(gathered),
            [false, true, true, true, true, true, false, false, false]
        );
        // Where every rank has an expert of every row.
        assert!(Shape { experts: 4, top_k: 4, ..shape(4) }.gathers());
        assert!(!Shape { experts: 8, top_k: 1, ..shape(8) }.gathers());
    }

    fn shapes() -> impl Strategy<Value = Shape> {
        let row_bytes = [1_usize..8000, 1..8000];
        (1_usize..33, 1_usize..129, 1_usize..9, row_bytes, 0_u32..5000, 0_usize..1 << 26).prop_map(
            |(ranks, experts, top_k, row_bytes, rows_max, room)| Shape {
                ranks,
                experts,
                top_k,
                row_bytes,
                rows_max,
                room,
            },
        )
    }

    proptest! {
        /// No token is dropped: a slot holds all rows of the rank that has most, and all their results.
        #[test]
        fn slots_hold_whatever_experts_are_chosen(
            shape in shapes(),
            rows in prop::collection::vec(0_u32..5000, 1..33),
        ) {
            let most = *rows.iter().max().expect("at least one") as usize;
            let way = shape.way(&rows);
            for (kind, each) in [(ExchangeKind::Dispatch, 1), (ExchangeKind::Combine, shape.top_k)] {
                let row_bytes = shape.row_bytes[usize::from(kind == ExchangeKind::Combine)];
                let exchange = Exchange { layer: LayerIdx(3), kind, row_bytes };
                let Some(slot) = shape.slot(way, exchange) else { continue };
                prop_assert!(slot.bytes >= most * each * row_bytes && slot.bytes.is_multiple_of(16));
                prop_assert!(slot.stride() * shape.ranks <= shape.room);
                prop_assert!(slot.stride() * shape.ranks <= shape.slots_bytes());
                prop_assert!(shape.ranks == 1 || shape.slots_bytes() <= SLOTS_BYTES_MAX);
                prop_assert_eq!(slot.exchange, 6 + u32::from(kind == ExchangeKind::Combine));
            }
        }

        /// All ranks choose alike, whoever has the rows.
        #[test]
        fn the_way_depends_on_the_step_alone(shape in shapes(), mut rows in prop::collection::vec(0_u32..200, 1..33)) {
            let way = shape.way(&rows);
            rows.reverse();
            prop_assert_eq!(shape.way(&rows), way);
        }
    }
}
