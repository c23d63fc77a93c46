//! What planning costs, in operations: a number that does not depend on the machine.

/// What planning has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Steps planned.
    pub steps: u64,
    /// Rows planned.
    pub rows: u64,
    /// Operations: sequences and ranks looked at, blocks touched.
    pub ops: u64,
}

impl Work {
    /// One sequence, rank or block more.
    pub const fn touch(&mut self) {
        self.ops += 1;
    }

    /// So many sequences, ranks or blocks more.
    pub const fn touch_all(&mut self, count: usize) {
        self.ops += count as u64;
    }

    /// A step of so many rows was planned.
    pub(crate) const fn step(&mut self, rows: u32) {
        self.steps += 1;
        self.rows += rows as u64;
    }

    /// Both together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { steps: self.steps + other.steps, rows: self.rows + other.rows, ops: self.ops + other.ops }
    }
}
