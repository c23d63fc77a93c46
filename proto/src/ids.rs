//! Ids and counts, each its own type, so that a rank cannot be passed for a slot.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl $name {
            /// The number as an index into host memory.
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}

id!(
    /// One lockstep group of ranks.
    CellId(u32)
);
id!(
    /// A worker's place in its cell for one epoch, counted from 0.
    Rank(u32)
);
id!(
    /// A sequence: one choice of one request. Never used twice within a term.
    SeqId(u64)
);
id!(
    /// A token of the model's vocabulary.
    TokenId(u32)
);
id!(
    /// A token's place in its sequence, counted from 0.
    Position(u32)
);
id!(
    /// A transformer layer, counted from 0.
    LayerIdx(u32)
);
id!(
    /// A logical expert of a layer, as the router names it.
    ExpertId(u32)
);
id!(
    /// A physical place for an expert on one rank.
    ExpertSlot(u32)
);
id!(
    /// A block of the paged KV memory of one rank and one pool.
    BlockId(u32)
);
id!(
    /// A number of bytes.
    Bytes(u64)
);
