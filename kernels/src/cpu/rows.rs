//! Rows of activations in host memory.

use crate::memory::Aligned;

/// f32 `[n, cols]` with room for a fixed number of rows.
#[derive(Debug)]
pub struct Rows {
    data: Aligned<f32>,
    cols: usize,
    len: usize,
}

impl Rows {
    pub(super) fn new(rows: usize, cols: usize) -> Self {
        Self { data: Aligned::resident(rows * cols), cols, len: 0 }
    }

    /// Numbers of a row.
    pub(super) const fn cols(&self) -> usize {
        self.cols
    }

    /// Rows it holds now, `n`.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Rows it has room for.
    pub(super) fn capacity(&self) -> usize {
        self.data.len().checked_div(self.cols).unwrap_or(0)
    }

    /// Sets `n`, at most the capacity.
    pub(super) fn set_len(&mut self, len: usize) {
        debug_assert!(len <= self.capacity(), "{len} rows in room for {}", self.capacity());
        self.len = len.min(self.capacity());
    }

    /// The numbers of all rows held.
    pub(super) fn values(&self) -> &[f32] {
        &self.data[..self.len * self.cols]
    }

    /// The numbers of all rows held.
    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len * self.cols]
    }

    /// One row.
    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.cols..(row + 1) * self.cols]
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.data.bytes()
    }
}
