//! Exchange buffers in host memory.

/// Bytes to or from each rank, this one included. The vectors keep their capacity from step to step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostParts {
    /// One entry for each rank.
    pub by_rank: Vec<Vec<u8>>,
}

impl HostParts {
    /// Empty parts for `ranks` ranks.
    #[must_use]
    pub fn new(ranks: usize) -> Self {
        Self { by_rank: vec![Vec::new(); ranks] }
    }

    /// Empties every part and keeps the memory.
    pub fn clear(&mut self) {
        self.by_rank.iter_mut().for_each(Vec::clear);
    }
}
