//! A step's rows, on the host for checks and on the device for kernels.

use std::sync::Arc;

use super::angles::Angles;
use super::choose::TILE_ROWS;
use super::device::{Buffer, Memory, Plain};
use super::sample::DRAWS_BYTES;
use crate::cpu::{check, need};
use crate::{BLOCK_SIZE, KernelError, KvLayer, KvShape, RopeTable, SEGMENT, StepInputs, TokenSource};

/// Block tables are as long as a multiple of this.
pub(super) const STRIDE: usize = 16;

/// Where something of the step lies in the step's buffer.
pub(super) type Offset = u64;

/// A step.
#[derive(Debug)]
pub(super) struct Inputs {
    pub(super) step: StepInputs,
    buffer: Buffer,
    pub(super) tokens: Offset,
    pub(super) sampled: Offset,
    pub(super) positions: Offset,
    pub(super) sequences: Offset,
    pub(super) cos: Offset,
    pub(super) sin: Offset,
    angles: Angles,
    /// Half of `D`, by the rope table.
    pub(super) half: usize,
    /// For each of [`TILE_ROWS`]: (first row, rows) of one sequence at consecutive positions, at most as many.
    tiles: [Tiles; 2],
    /// Of each pool: `[sequences, stride]`.
    tables: Vec<Table>,
    /// What was found to exist in this step: a layer's pool and blocks, and what its rows see.
    checked: Vec<(usize, usize, Sight)>,
}

/// The step's rows in tiles.
#[derive(Debug, Default)]
struct Tiles {
    at: Offset,
    /// (first row, rows)
    tiles: Vec<[u32; 2]>,
}

#[derive(Clone, Copy, Debug)]
struct Table {
    at: Offset,
    stride: u32,
}

/// What a row reads of its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// Its own position.
    Itself,
    /// The last positions; all without a number.
    Window(Option<u32>),
}

impl Sight {
    /// The first position that a row at `position` sees.
    pub(super) fn first(self, position: usize) -> usize {
        match self {
            Self::Itself => position,
            Self::Window(None) => 0,
            Self::Window(Some(window)) => (position + 1).saturating_sub(window.max(1) as usize),
        }
    }
}

/// Collects what is copied to the device at once.
#[derive(Debug, Default)]
pub(super) struct Staging {
    pub(super) bytes: Vec<u8>,
}

impl Staging {
    /// Appends numbers at a multiple of 16.
    pub(super) fn push<T: Plain>(&mut self, values: impl IntoIterator<Item = T>) -> Offset {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.bytes.len() as u64;
        values.into_iter().for_each(|value| value.append(&mut self.bytes));
        at
    }
}

impl Inputs {
    pub(super) fn new(memory: &Arc<Memory>) -> Self {
        Self {
            step: StepInputs::default(),
            buffer: memory.nothing(),
            tokens: 0,
            sampled: 0,
            positions: 0,
            sequences: 0,
            cos: 0,
            sin: 0,
            angles: Angles::default(),
            half: 0,
            tiles: Default::default(),
            tables: Vec::new(),
            checked: Vec::new(),
        }
    }

    /// Makes room for inputs of `bytes`.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), KernelError> {
        self.buffer.reserve(bytes)
    }

    /// Rows of the step.
    pub(super) const fn rows(&self) -> usize {
        self.step.positions.len()
    }

    /// Takes a step in. Rows that are not whole are no rows.
    pub(super) fn begin(&mut self, inputs: &StepInputs, rope: &RopeTable) -> Result<(), KernelError> {
        let rows = inputs.tokens.len();
        let whole = need("the positions of the step's rows", inputs.positions.len(), rows)
            .and_then(|()| need("the sequences of the step's rows", inputs.sequences.len(), rows));
        if whole.is_ok() {
            self.step.clone_from(inputs);
        } else {
            self.step = StepInputs::default();
        }
        self.checked.clear();
        self.half = rope.inv_freq.len();
        let uploaded = self.upload(rope);
        whole.and(uploaded)
    }

    fn upload(&mut self, rope: &RopeTable) -> Result<(), KernelError> {
        let mut staging = Staging::default();
        let (tokens, sampled): (Vec<u32>, Vec<u32>) = self
            .step
            .tokens
            .iter()
            .map(|source| match *source {
                TokenSource::Given(token) => (token, 0),
                TokenSource::Sampled(slot) => (slot, 1),
            })
            .unzip();
        self.tokens = staging.push(tokens);
        self.sampled = staging.push(sampled);
        self.positions = staging.push(self.step.positions.iter().copied());
        self.sequences = staging.push(self.step.sequences.iter().copied());
        let [cos, sin] = self.angles.of(&self.step.positions, rope);
        self.cos = staging.push(cos);
        self.sin = staging.push(sin);
        for (tiles, rows_max) in self.tiles.iter_mut().zip(TILE_ROWS) {
            tiles.tiles = tiles_of(&self.step.sequences, &self.step.positions, rows_max);
            tiles.at = staging.push(tiles.tiles.as_flattened().iter().copied());
        }
        self.tables.clear();
        for tables in &self.step.tables {
            // So that it seldom differs from the last step's.
            let stride = tables.iter().map(Vec::len).max().unwrap_or(0).next_multiple_of(STRIDE);
            let padded = tables
                .iter()
                .flat_map(|table| table.iter().copied().chain(std::iter::repeat_n(u32::MAX, stride - table.len())));
            self.tables.push(Table { at: staging.push(padded), stride: stride as u32 });
        }
        self.buffer.reserve(staging.bytes.len())?;
        self.buffer.upload(0, &staging.bytes)
    }

    /// The address of something.
    pub(super) const fn at(&self, offset: Offset) -> u64 {
        self.buffer.address() + offset
    }

    /// Address of the tiles of this tiling, and how many; and the segments of keys that the widest of them spans.
    pub(super) fn tiles(&self, tiling: usize, sight: Sight) -> (u64, usize, usize) {
        let Tiles { at, tiles } = &self.tiles[tiling];
        let spans = |&[first, rows]: &[u32; 2]| {
            let position = self.step.positions[first as usize] as usize;
            (position + rows as usize - 1) / SEGMENT - sight.first(position) / SEGMENT + 1
        };
        (self.at(*at), tiles.len(), tiles.iter().map(spans).max().unwrap_or(1))
    }

    /// Address and stride of a pool's table.
    pub(super) fn table(&self, pool: usize) -> (u64, u32) {
        self.tables.get(pool).map_or((0, 0), |table| (self.at(table.at), table.stride))
    }

    /// Refuses tokens and slots that do not exist.
    pub(super) fn check_tokens(&self, slots: usize, vocab: usize) -> Result<(), KernelError> {
        for source in &self.step.tokens {
            match *source {
                TokenSource::Given(token) => check("token", token as usize, vocab)?,
                TokenSource::Sampled(slot) => check("token slot", slot as usize, slots)?,
            };
        }
        Ok(())
    }

    /// Checks that the blocks of all positions that the rows see exist; once a step for each pool and sight.
    pub(super) fn check_tables(&mut self, shape: &KvShape, layer: KvLayer, sight: Sight) -> Result<(), KernelError> {
        let pools = shape.pools.len();
        let pool =
            shape.pools.get(layer.pool).ok_or(KernelError::Plan { what: "KV pool", index: layer.pool, len: pools })?;
        check("KV layer", layer.layer, pool.layers)?;
        let key = (layer.pool, pool.blocks, sight);
        if self.step.positions.is_empty() || self.checked.contains(&key) {
            return Ok(());
        }
        let pools = self.step.tables.len();
        let tables = self.step.tables.get(layer.pool).ok_or(KernelError::Plan {
            what: "table of pool",
            index: layer.pool,
            len: pools,
        })?;
        for (&position, &sequence) in self.step.positions.iter().zip(&self.step.sequences) {
            let table = &tables[check("sequence", sequence as usize, tables.len())?];
            let position = position as usize;
            let stretch = check("stretch of a block table", position / BLOCK_SIZE, table.len())?;
            for &block in &table[sight.first(position) / BLOCK_SIZE..=stretch] {
                check("KV block", block as usize, pool.blocks)?;
            }
        }
        self.checked.push(key);
        Ok(())
    }
}

/// Cuts rows into (first row, rows) of one sequence at consecutive positions, at most `rows_max` each.
fn tiles_of(sequences: &[u32], positions: &[u32], rows_max: usize) -> Vec<[u32; 2]> {
    let mut tiles: Vec<[u32; 2]> = Vec::new();
    for (row, (&sequence, &position)) in sequences.iter().zip(positions).enumerate() {
        let follows = row > 0 && sequences[row - 1] == sequence && positions[row - 1].checked_add(1) == Some(position);
        match tiles.last_mut() {
            Some([_, rows]) if follows && (*rows as usize) < rows_max => *rows += 1,
            _ => tiles.push([row as u32, 1]),
        }
    }
    tiles
}

/// Room for what a step learns only after its layers are enqueued: rows to gather, draws. It is copied ahead of them.
#[derive(Debug)]
pub(super) struct Late {
    buffer: Buffer,
    used: usize,
}

impl Late {
    pub(super) fn new(memory: &Arc<Memory>) -> Self {
        Self { buffer: memory.nothing(), used: 0 }
    }

    /// Makes room for `bytes` at once.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), KernelError> {
        self.buffer.reserve(bytes)?;
        // What is recorded may still use memory that this was made from: what comes next goes behind it.
        self.used = self.buffer.bytes();
        Ok(())
    }

    /// A step begins, and nothing is recorded of the last one.
    pub(super) const fn begin(&mut self) {
        self.used = 0;
    }

    /// Copies bytes to the device and says where they are, until as many have come after them as there is room for.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<u64, KernelError> {
        let at = self.used.next_multiple_of(16);
        if bytes.is_empty() {
            return Ok(self.buffer.address());
        }
        if at + bytes.len() <= self.buffer.bytes() {
            // What is recorded reads only what was pushed before in this step.
            self.buffer.upload_ahead(at, bytes)?;
            self.used = at + bytes.len();
            return Ok(self.buffer.address() + at as u64);
        }
        self.buffer.reserve(bytes.len().max(DRAWS_BYTES))?;
        self.buffer.upload(0, bytes)?;
        self.used = bytes.len();
        Ok(self.buffer.address())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_runs_of_one_sequence() {
        let sequences = [0, 0, 0, 0, 0, 1, 1, 2, 2, 0];
        let positions = [5, 6, 7, 8, 9, 10, 12, 13, 14, 15];
        assert_eq!(tiles_of(&sequences, &positions, 4), [[0, 4], [4, 1], [5, 1], [6, 1], [7, 2], [9, 1]]);
        assert_eq!(tiles_of(&sequences, &positions, 8)[0], [0, 5]);
        assert!(tiles_of(&[], &[], 8).is_empty());
        assert_eq!(tiles_of(&[0, 0], &[u32::MAX, 0], 8), [[0, 1], [1, 1]]);
    }
}
