//! The reference functions as a backend.

use super::linear::linear;
use super::{attention, exchange, mxfp4, q8, rms_norm, rope, router, sample, swiglu};
use crate::memory::{Packed, Source};
use crate::{
    BLOCK_SIZE, Backend, DenseFormat, DenseUse, Draw, EmbeddingSource, ExpertShape, ExpertSource, HostParts,
    KernelError, KvLayer, KvShape, NO_SLOT, Precision, RopeTable, Sampled, Stack, StepInputs, TokenSource, bf16, f16,
    wire,
};

/// Every op by its reference function, on one thread; for tests of models and of other backends.
///
/// It trusts its plan: a step that names what does not exist panics.
#[derive(Debug, Default)]
pub struct Reference {
    precision: Precision,
    dense: DenseFormat,
    top_k: usize,
    inputs: StepInputs,
    rope: Option<RopeTable>,
    tokens: Vec<u32>,
    sampled: Vec<Sampled>,
    error: Option<KernelError>,
    allocated: u64,
}

impl Reference {
    /// A backend that rounds as `precision` and `dense` say.
    #[must_use]
    pub fn new(precision: Precision, dense: DenseFormat) -> Self {
        Self { precision, dense, ..Self::default() }
    }

    /// What an expert's matrix takes for `x`.
    fn operand(&self, x: &[f32]) -> Vec<f64> {
        match self.precision {
            Precision::Exact => x.iter().copied().map(f64::from).collect(),
            Precision::Fast => mxfp4::round_to_int8(x),
        }
    }

    /// What the KV memory keeps of a number.
    fn kept(&self, value: f32) -> f32 {
        match self.precision {
            Precision::Exact => value,
            Precision::Fast => f16::widen(f16::narrow(value)),
        }
    }

    fn block(&self, layer: KvLayer, row: usize, position: u32) -> (usize, usize) {
        let table = &self.inputs.tables[layer.pool][self.inputs.sequences[row] as usize];
        (table[position as usize / BLOCK_SIZE] as usize, position as usize % BLOCK_SIZE)
    }
}

/// f32 `[n, cols]`.
#[derive(Clone, Debug)]
pub struct Rows {
    cols: usize,
    values: Vec<f32>,
}

impl Rows {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..(row + 1) * self.cols]
    }

    fn iter(&self) -> std::slice::ChunksExact<'_, f32> {
        self.values.chunks_exact(self.cols)
    }
}

/// `[rows, cols]` and `[rows]`.
#[derive(Clone, Debug)]
pub struct Dense {
    /// Whether rows are rounded before the product, as the weights are.
    rounded: bool,
    weight: Vec<f64>,
    bias: Vec<f32>,
}

/// `[V, H]`
#[derive(Clone, Debug)]
pub struct Embedding {
    cols: usize,
    table: Vec<f32>,
}

/// Decoded matrices.
#[derive(Clone, Debug)]
struct Expert {
    gate_up: Vec<f64>,
    gate_up_bias: Vec<f32>,
    down: Vec<f64>,
    down_bias: Vec<f32>,
}

/// The expert slots of one layer.
#[derive(Clone, Debug)]
pub struct Experts {
    shape: ExpertShape,
    slots: Vec<Option<Expert>>,
}

/// Key and value of every position of every block, `[Nkv * D]` each.
#[derive(Clone, Debug)]
pub struct Kv {
    shape: KvShape,
    /// By pool, layer, block, position.
    pools: Vec<Vec<Vec<[KeyValue; BLOCK_SIZE]>>>,
}

#[derive(Clone, Debug, Default)]
struct KeyValue {
    key: Vec<f32>,
    value: Vec<f32>,
}

/// Experts and weights of each row, `[T, K]`.
#[derive(Clone, Debug)]
pub struct Routes {
    top_k: usize,
    rows: Vec<Vec<(u32, f32)>>,
}

/// Received rows, by (rank, record, choice).
#[derive(Clone, Debug)]
pub struct Work {
    ranks: usize,
    items: Vec<Item>,
}

#[derive(Clone, Debug)]
struct Item {
    rank: usize,
    slot: usize,
    row: Vec<f32>,
    activations: Vec<f32>,
}

fn need(what: &'static str, got: usize, need: usize) -> Result<(), KernelError> {
    if got == need { Ok(()) } else { Err(KernelError::Size { what, got, need }) }
}

impl Experts {
    /// Bytes of an expert's tensors: blocks, scales and bias of gate-up and of down.
    fn part_bytes(&self) -> [usize; 6] {
        let ExpertShape { hidden, intermediate, .. } = self.shape;
        let of = |rows: usize, cols: usize| [rows * cols / 2, rows * cols / mxfp4::BLOCK, rows * 2];
        let ([a, b, c], [d, e, f]) = (of(2 * intermediate, hidden), of(hidden, intermediate));
        [a, b, c, d, e, f]
    }
}

impl Dense {
    fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let x = if self.rounded { mxfp4::round_to_int8(x) } else { x.iter().copied().map(f64::from).collect() };
        linear(&x, &self.weight, &self.bias)
    }
}

impl Backend for Reference {
    type Rows = Rows;
    type Vector = Vec<f32>;
    type Dense = Dense;
    type Embedding = Embedding;
    type Experts = Experts;
    type Places = Vec<(u32, u32)>;
    type Kv = Kv;
    type Routes = Routes;
    type Work = Work;
    type Parts = HostParts;
    type Ended = Result<Vec<Sampled>, KernelError>;

    fn rows(&mut self, rows: usize, cols: usize) -> Rows {
        self.allocated += (rows * cols * 4) as u64;
        Rows { cols, values: Vec::with_capacity(rows * cols) }
    }

    fn routes(&mut self, _rows: usize, top_k: usize) -> Routes {
        self.top_k = top_k;
        Routes { top_k, rows: Vec::new() }
    }

    fn work(&mut self, _received: usize, _choices: usize, _shape: ExpertShape) -> Work {
        Work { ranks: 0, items: Vec::new() }
    }

    fn parts(&mut self, ranks: usize, _bytes_max: usize) -> HostParts {
        HostParts::new(ranks)
    }

    fn kv(&mut self, shape: &KvShape) -> Kv {
        let block = || std::array::from_fn(|_| KeyValue::default());
        let layer = |blocks| std::iter::repeat_with(block).take(blocks).collect();
        let pools = shape.pools.iter().map(|pool| (0..pool.layers).map(|_| layer(pool.blocks)).collect()).collect();
        Kv { shape: shape.clone(), pools }
    }

    fn token_slots(&mut self, slots: usize) {
        self.tokens = vec![0; slots];
    }

    fn vector(&mut self, source: Source<'_>) -> Result<Vec<f32>, KernelError> {
        need("a vector of bf16", source.bytes().len() % 2, 0)?;
        Ok(bf16::values(source.bytes()).collect())
    }

    // Packed are the checkpoint's bytes, one tensor after the other.

    fn packing(&self) -> String {
        "reference".to_owned()
    }

    fn dense_bytes(&self, _used: DenseUse, rows: usize, cols: usize) -> usize {
        rows * cols * 2 + rows * 2
    }

    fn pack_dense(&self, used: DenseUse, cols: usize, stack: &[Stack<'_>], out: &mut [u8]) -> Result<(), KernelError> {
        let rows = stack.iter().map(|matrix| matrix.rows(cols)).sum::<Result<usize, _>>()?;
        need("the room for a packed matrix", out.len(), self.dense_bytes(used, rows, cols))?;
        let weights: Vec<_> = stack.iter().map(|matrix| matrix.weight.bytes()).collect();
        let (weight, bias) = out.split_at_mut(rows * cols * 2);
        weight.copy_from_slice(&weights.concat());
        let biases = stack.iter().zip(&weights).map(|(matrix, weight)| match matrix.bias {
            Some(bias) => bias.bytes().to_vec(),
            None => vec![0; weight.len() / cols],
        });
        bias.copy_from_slice(&biases.collect::<Vec<_>>().concat());
        Ok(())
    }

    fn hold_dense(&mut self, used: DenseUse, rows: usize, cols: usize, packed: Packed) -> Result<Dense, KernelError> {
        need("a packed matrix", packed.len(), self.dense_bytes(used, rows, cols))?;
        let (weight, bias) = packed.split_at(rows * cols * 2);
        let weight: Vec<f32> = bf16::values(weight).collect();
        let rounded = used == DenseUse::Projection && self.dense == DenseFormat::Q8;
        let weight = if rounded {
            weight.chunks_exact(cols).flat_map(q8::round).collect()
        } else {
            weight.into_iter().map(f64::from).collect()
        };
        self.allocated += packed.len() as u64;
        Ok(Dense { rounded, weight, bias: bf16::values(bias).collect() })
    }

    fn embedding(&mut self, cols: usize, table: EmbeddingSource) -> Result<Embedding, KernelError> {
        need("the embedding", table.table().len() % (cols * 2), 0)?;
        Ok(Embedding { cols, table: bf16::values(table.table()).collect() })
    }

    fn experts(&mut self, slots: usize, shape: ExpertShape) -> Experts {
        Experts { shape, slots: vec![None; slots] }
    }

    fn expert_bytes(&self, experts: &Experts) -> usize {
        experts.part_bytes().iter().sum()
    }

    fn pack_expert(&self, experts: &Experts, source: &ExpertSource<'_>, out: &mut [u8]) -> Result<(), KernelError> {
        need("the room for a packed expert", out.len(), self.expert_bytes(experts))?;
        let parts = [
            (source.gate_up_blocks, "gate_up_proj_blocks of an expert"),
            (source.gate_up_scales, "gate_up_proj_scales of an expert"),
            (source.gate_up_bias, "gate_up_proj_bias of an expert"),
            (source.down_blocks, "down_proj_blocks of an expert"),
            (source.down_scales, "down_proj_scales of an expert"),
            (source.down_bias, "down_proj_bias of an expert"),
        ];
        let mut rest = out;
        for ((part, what), bytes) in parts.into_iter().zip(experts.part_bytes()) {
            need(what, part.bytes().len(), bytes)?;
        }
        for [(blocks, _), (scales, what)] in [[parts[0], parts[1]], [parts[3], parts[4]]] {
            if let Some(index) = crate::scales::unusable(scales.bytes(), blocks.bytes()) {
                return Err(KernelError::Scale { what, index });
            }
        }
        for ((part, _), bytes) in parts.into_iter().zip(experts.part_bytes()) {
            let (here, behind) = rest.split_at_mut(bytes);
            here.copy_from_slice(part.bytes());
            rest = behind;
        }
        Ok(())
    }

    fn hold_expert(&mut self, experts: &mut Experts, slot: usize, packed: Packed) -> Result<(), KernelError> {
        need("a packed expert", packed.len(), self.expert_bytes(experts))?;
        let mut rest = &packed[..];
        let parts = experts.part_bytes().map(|bytes| {
            let (here, behind) = rest.split_at(bytes);
            rest = behind;
            here
        });
        self.allocated += packed.len() as u64;
        experts.slots[slot] = Some(Expert {
            gate_up: mxfp4::decode(parts[0], parts[1]),
            gate_up_bias: bf16::values(parts[2]).collect(),
            down: mxfp4::decode(parts[3], parts[4]),
            down_bias: bf16::values(parts[5]).collect(),
        });
        Ok(())
    }

    fn clear_expert(&mut self, experts: &mut Experts, slot: usize) {
        if experts.slots[slot].take().is_some() {
            self.allocated -= self.expert_bytes(experts) as u64;
        }
    }

    fn places(&mut self, places: &[(u32, u32)]) -> Vec<(u32, u32)> {
        places.to_vec()
    }

    fn begin(&mut self, inputs: &StepInputs, rope: &RopeTable) {
        self.sampled.clear();
        self.inputs = inputs.clone();
        self.rope = Some(rope.clone());
    }

    fn copy_block(&mut self, kv: &mut Kv, pool: usize, from: u32, to: u32) {
        for layer in &mut kv.pools[pool] {
            layer[to as usize] = layer[from as usize].clone();
        }
    }

    fn embed(&mut self, table: &Embedding, out: &mut Rows) {
        let token = |source: &TokenSource| match *source {
            TokenSource::Given(token) => token,
            TokenSource::Sampled(slot) => self.tokens[slot as usize],
        };
        let tokens = self.inputs.tokens.iter().map(|source| token(source) as usize);
        out.values = tokens.flat_map(|t| &table.table[t * table.cols..(t + 1) * table.cols]).copied().collect();
    }

    fn norm(&mut self, x: &Rows, weight: &Vec<f32>, eps: f32, out: &mut Rows) {
        out.values = x.iter().flat_map(|row| rms_norm::rms_norm(row, weight, eps)).collect();
    }

    fn project(&mut self, x: &Rows, weight: &Dense, out: &mut Rows) {
        out.values = x.iter().flat_map(|row| weight.multiply(row)).collect();
    }

    fn rotate_and_store(&mut self, qkv: &mut Rows, kv: &mut Kv, layer: KvLayer) {
        let Some(table) = &self.rope else { return };
        let (dim, width) = (kv.shape.head_dim, kv.shape.kv_heads * kv.shape.head_dim);
        for (row, values) in qkv.values.chunks_exact_mut(qkv.cols).enumerate() {
            let position = self.inputs.positions[row];
            let keys_end = values.len() - width;
            values[..keys_end].chunks_exact_mut(dim).for_each(|head| rope::rotate(head, position, table));
            let keep = |values: &[f32]| values.iter().map(|&value| self.kept(value)).collect();
            let (block, at) = self.block(layer, row, position);
            kv.pools[layer.pool][layer.layer][block][at] =
                KeyValue { key: keep(&values[keys_end - width..keys_end]), value: keep(&values[keys_end..]) };
        }
    }

    fn attend(&mut self, qkv: &Rows, kv: &Kv, layer: KvLayer, sinks: &Vec<f32>, window: Option<u32>, out: &mut Rows) {
        let dim = kv.shape.head_dim;
        let group = sinks.len() / kv.shape.kv_heads;
        out.values.clear();
        for (row, values) in qkv.iter().enumerate() {
            let stored: Vec<&KeyValue> = attention::visible(self.inputs.positions[row], window)
                .map(|position| self.block(layer, row, position))
                .map(|(block, at)| &kv.pools[layer.pool][layer.layer][block][at])
                .collect();
            for (head, &sink) in sinks.iter().enumerate() {
                let of_head = head / group * dim..(head / group + 1) * dim;
                let keys: Vec<&[f32]> = stored.iter().map(|stored| &stored.key[of_head.clone()]).collect();
                let of_values: Vec<&[f32]> = stored.iter().map(|stored| &stored.value[of_head.clone()]).collect();
                let q = &values[head * dim..(head + 1) * dim];
                out.values.extend(attention::attend(q, &keys, &of_values, sink));
            }
        }
    }

    fn project_add(&mut self, x: &Rows, weight: &Dense, residual: &mut Rows) {
        let added = x.iter().flat_map(|row| weight.multiply(row));
        residual.values.iter_mut().zip(added).for_each(|(residual, added)| *residual += added);
    }

    fn route(&mut self, x: &Rows, router: &Dense, routes: &mut Routes) {
        let logits = x.iter().map(|row| router.multiply(row));
        routes.rows = logits.map(|logits| router::route(&logits, routes.top_k)).collect();
    }

    fn dispatch(&mut self, x: &Rows, routes: &Routes, places: &Vec<(u32, u32)>, out: &mut HostParts) {
        out.clear();
        for (row, chosen) in x.iter().zip(&routes.rows) {
            let chosen: Vec<_> = chosen.iter().map(|&(expert, _)| places[expert as usize]).collect();
            for (rank, part) in (0..).zip(&mut out.by_rank) {
                part.extend(exchange::record(self.precision, row, &chosen, rank).into_iter().flatten());
            }
        }
    }

    fn receive(&mut self, received: &HostParts, experts: &Experts, work: &mut Work) {
        let record = self.dispatch_record(self.top_k, experts.shape.hidden);
        work.ranks = received.by_rank.len();
        work.items.clear();
        for (rank, bytes) in received.by_rank.iter().enumerate() {
            let filled = |slot: usize| matches!(experts.slots.get(slot), Some(Some(_)));
            let records = bytes.chunks_exact(record).map(|bytes| exchange::parse(self.precision, bytes, self.top_k));
            let items: Vec<Item> = records
                .flat_map(|(slots, row)| {
                    let held = slots.into_iter().filter(|&slot| slot != NO_SLOT);
                    held.map(|slot| Item { rank, slot: slot as usize, row: row.clone(), activations: Vec::new() })
                        .collect::<Vec<_>>()
                })
                .collect();
            let what = if !bytes.len().is_multiple_of(record) {
                "a part that is not made of whole records"
            } else if !items.iter().all(|item| filled(item.slot)) {
                "a row for an expert slot that is empty"
            } else {
                work.items.extend(items);
                continue;
            };
            self.error.get_or_insert(KernelError::Received { rank, what });
        }
    }

    fn gate_up(&mut self, experts: &Experts, work: &mut Work) {
        for item in &mut work.items {
            let Some(expert) = &experts.slots[item.slot] else { continue };
            let y = linear(&self.operand(&item.row), &expert.gate_up, &expert.gate_up_bias);
            item.activations = swiglu::swiglu(&y, experts.shape.limit);
        }
    }

    fn down(&mut self, experts: &Experts, work: &Work, out: &mut HostParts) {
        out.by_rank = vec![Vec::new(); work.ranks];
        for item in &work.items {
            let Some(expert) = &experts.slots[item.slot] else { continue };
            let y = linear(&self.operand(&item.activations), &expert.down, &expert.down_bias);
            out.by_rank[item.rank].extend(exchange::to_wire(self.precision, &y));
        }
    }

    fn combine(&mut self, returned: &HostParts, routes: &Routes, places: &Vec<(u32, u32)>, residual: &mut Rows) {
        let record = self.combine_record(residual.cols);
        let rank_of = |expert: u32| places[expert as usize].0 as usize;
        for (rank, part) in returned.by_rank.iter().enumerate() {
            let results = routes.rows.iter().flatten().filter(|&&(expert, _)| rank_of(expert) == rank).count();
            if part.len() != results * record {
                let what =
                    if part.len() < results * record { "fewer results than rows" } else { "more results than rows" };
                self.error.get_or_insert(KernelError::Received { rank, what });
                return;
            }
        }
        let mut results: Vec<_> = returned.by_rank.iter().map(|part| part.chunks_exact(record)).collect();
        for (residual, chosen) in residual.values.chunks_exact_mut(residual.cols).zip(&routes.rows) {
            let mut sum = vec![0.0; residual.len()];
            for &(expert, weight) in chosen {
                let bytes = results[rank_of(expert)].next().expect("counted above");
                let row = exchange::from_wire(self.precision, bytes);
                sum.iter_mut().zip(row).for_each(|(sum, y)| *sum += f64::from(weight) * f64::from(y));
            }
            residual.iter_mut().zip(sum).for_each(|(residual, sum)| *residual = (f64::from(*residual) + sum) as f32);
        }
    }

    fn gather(&mut self, x: &Rows, rows: &[u32], out: &mut Rows) {
        out.values = rows.iter().flat_map(|&row| x.row(row as usize)).copied().collect();
    }

    fn sample(&mut self, logits: &Rows, draws: &[Draw]) {
        for (row, draw) in logits.iter().zip(draws) {
            let sampled = sample::sample(row, draw);
            self.tokens[draw.slot as usize] = sampled.token;
            self.sampled.push(sampled);
        }
    }

    fn set_token(&mut self, slot: u32, token: u32) {
        self.tokens[slot as usize] = token;
    }

    fn end(&mut self) -> Self::Ended {
        let sampled = std::mem::take(&mut self.sampled);
        self.finish().map(|()| sampled)
    }

    fn is_done(&self, _ended: &Self::Ended) -> bool {
        true
    }

    fn result(&mut self, ended: Self::Ended) -> Result<Vec<Sampled>, KernelError> {
        ended
    }

    fn read(&mut self, rows: &Rows) -> Vec<f32> {
        rows.values.clone()
    }

    fn write(&mut self, rows: &mut Rows, values: &[f32]) {
        rows.values = values.to_vec();
    }

    fn finish(&mut self) -> Result<(), KernelError> {
        self.error.take().map_or(Ok(()), Err)
    }

    fn dispatch_record(&self, top_k: usize, hidden: usize) -> usize {
        wire::dispatch_record(self.precision, top_k, hidden)
    }

    fn combine_record(&self, hidden: usize) -> usize {
        hidden * wire::bytes(self.precision)
    }

    fn allocated(&self) -> u64 {
        self.allocated
    }
}
