//! A step's rows, on the host for checks and on the device for kernels.

use std::sync::Arc;

use super::angles::Angles;
use super::choose::{CHUNK, MANY_ROWS, TILE_ROWS};
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
    /// Runs of at least [`MANY_ROWS`] rows, cut for each of [`TILE_ROWS`].
    many: [Tiles; 2],
    /// All other rows, each by itself.
    few: Tiles,
    /// Of each pool: `[sequences, stride]`.
    tables: Vec<Table>,
    /// What was found to exist in this step: a layer's pool and blocks, and what its rows see.
    checked: Vec<(usize, usize, Sight)>,
}

/// Rows of one sequence at consecutive positions, as the kernels of attention have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    first: u32,
    count: u32,
    /// Of the first row.
    position: u32,
    sequence: u32,
}

/// Some of the step's rows in tiles.
#[derive(Debug, Default)]
struct Tiles {
    at: Offset,
    tiles: Vec<Tile>,
}

impl Tiles {
    fn push_to(&mut self, staging: &mut Staging, tiles: Vec<Tile>) {
        let words = |tile: &Tile| [tile.first, tile.count, tile.position, tile.sequence];
        self.at = staging.push(tiles.iter().flat_map(words));
        self.tiles = tiles;
    }
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
            many: Default::default(),
            few: Tiles::default(),
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
        let (long, short): (Vec<Tile>, Vec<Tile>) = runs(&self.step.sequences, &self.step.positions)
            .into_iter()
            .partition(|run| run.count as usize >= MANY_ROWS);
        for (tiles, rows) in self.many.iter_mut().zip(TILE_ROWS) {
            tiles.push_to(&mut staging, cut(&long, rows));
        }
        self.few.push_to(&mut staging, cut(&short, 1));
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

    /// Segments of keys that the longest past of a row spans.
    pub(super) fn segments(&self, sight: Sight) -> usize {
        self.step.positions.iter().map(|&position| spans(position, 1, sight, SEGMENT)).max().unwrap_or(1)
    }

    /// Rows that are alone, and those that follow each other in the `tiling`: address of the tiles, how many, and the
    /// chunks of keys that the widest of them spans.
    pub(super) fn tiles(&self, tiling: usize, sight: Sight) -> [(u64, usize, usize); 2] {
        [&self.few, &self.many[tiling]].map(|Tiles { at, tiles }| {
            let chunks = tiles.iter().map(|tile| spans(tile.position, tile.count, sight, CHUNK)).max();
            (self.at(*at), tiles.len(), chunks.unwrap_or(0))
        })
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

/// How many stretches of `unit` positions `count` rows from `position` on see something of.
fn spans(position: u32, count: u32, sight: Sight, unit: usize) -> usize {
    let position = position as usize;
    (position + count as usize - 1) / unit - sight.first(position) / unit + 1
}

/// Stretches of rows of one sequence at consecutive positions.
fn runs(sequences: &[u32], positions: &[u32]) -> Vec<Tile> {
    let mut runs: Vec<Tile> = Vec::new();
    for ((first, &sequence), &position) in (0..).zip(sequences).zip(positions) {
        match runs.last_mut() {
            Some(run) if run.sequence == sequence && run.position.checked_add(run.count) == Some(position) => {
                run.count += 1;
            }
            _ => runs.push(Tile { first, count: 1, position, sequence }),
        }
    }
    runs
}

/// Cuts runs into tiles of at most `rows` rows.
fn cut(runs: &[Tile], rows: usize) -> Vec<Tile> {
    let of_run = |run: &Tile| {
        let Tile { first, count, position, sequence } = *run;
        (0..count).step_by(rows).map(move |at| Tile {
            first: first + at,
            count: (count - at).min(rows as u32),
            position: position + at,
            sequence,
        })
    };
    runs.iter().flat_map(of_run).collect()
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
    fn runs_are_of_one_sequence_and_tiles_are_pieces_of_them() {
        let sequences = [0, 0, 0, 0, 0, 1, 1, 2, 2, 0];
        let positions = [5, 6, 7, 8, 9, 10, 12, 13, 14, 15];
        let words = |tiles: &[Tile]| -> Vec<[u32; 4]> {
            tiles.iter().map(|tile| [tile.first, tile.count, tile.position, tile.sequence]).collect()
        };
        let runs_of = runs(&sequences, &positions);
        assert_eq!(words(&runs_of), [[0, 5, 5, 0], [5, 1, 10, 1], [6, 1, 12, 1], [7, 2, 13, 2], [9, 1, 15, 0]]);
        assert_eq!(words(&cut(&runs_of[..1], 2)), [[0, 2, 5, 0], [2, 2, 7, 0], [4, 1, 9, 0]]);
        assert_eq!(cut(&runs_of, 8), runs_of);
        assert!(cut(&runs(&[], &[]), 8).is_empty());
        assert_eq!(words(&runs(&[0, 0], &[u32::MAX, 0])), [[0, 1, u32::MAX, 0], [1, 1, 0, 0]]);
    }

    #[test]
    fn a_row_spans_what_it_sees() {
        let [all, few] = [Sight::Window(None), Sight::Window(Some(128))];
        assert_eq!([spans(0, 1, all, 256), spans(255, 1, all, 256), spans(256, 1, all, 256)], [1, 1, 2]);
        assert_eq!([spans(255, 1, few, 256), spans(256, 1, few, 256), spans(383, 1, few, 256)], [1, 2, 1]);
        assert_eq!([spans(250, 6, all, 256), spans(250, 7, all, 256)], [1, 2]);
    }
}
