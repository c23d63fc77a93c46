//! A step's rows, on the host for checks and on the device for kernels.

use std::sync::Arc;

use super::device::{Buffer, Memory, Plain, bytes_of};
use crate::cpu::{check, need};
use crate::{BLOCK_SIZE, KernelError, KvLayer, KvShape, RopeTable, StepInputs, TokenSource};

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
    /// Half of `D`, by the rope table.
    pub(super) half: usize,
    /// Of each pool: `[sequences, stride]`.
    tables: Vec<Table>,
    /// What was found to exist in this step: a layer's pool and blocks, and what its rows see.
    checked: Vec<(usize, usize, Sight)>,
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
#[derive(Default)]
struct Staging {
    bytes: Vec<u8>,
}

impl Staging {
    fn push<T: Plain>(&mut self, values: impl IntoIterator<Item = T>) -> Offset {
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
            half: 0,
            tables: Vec::new(),
            checked: Vec::new(),
        }
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
        let angles: Vec<(f64, f64)> = self
            .step
            .positions
            .iter()
            .flat_map(|&position| rope.inv_freq.iter().map(move |f| libm::sincos(f64::from(position) * f)))
            .collect();
        self.cos = staging.push(angles.iter().map(|(_, cos)| (cos * rope.scale) as f32));
        self.sin = staging.push(angles.iter().map(|(sin, _)| (sin * rope.scale) as f32));
        self.tables.clear();
        for tables in &self.step.tables {
            let stride = tables.iter().map(Vec::len).max().unwrap_or(0);
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

/// Numbers copied to a buffer of their own, which grows as needed.
pub(super) fn upload<T: Plain>(buffer: &mut Buffer, values: &[T]) -> Result<(), KernelError> {
    let bytes = bytes_of(values);
    buffer.reserve(bytes.len())?;
    buffer.upload(0, &bytes)
}
