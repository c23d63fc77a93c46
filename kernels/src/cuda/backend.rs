//! The trait, op by op: each does its work in [`Cuda`], and what goes wrong waits for the end of the step, or [`Backend::finish`].

use std::time::Instant;

use super::device::{Memory, bytes_of};
use super::pack::{ExpertLayout, LAYOUT, dense_bytes, pack_dense, pack_expert};
use super::{Cuda, Dense, Embedding, Ended, Experts, Kv, Parts, Places, Routes, Rows, Vector, Work};
use crate::cpu::{check, need};
use crate::memory::{Packed, Source};
use crate::{
    Backend, DenseUse, Draw, EmbeddingSource, ExpertShape, ExpertSource, KernelError, KvLayer, KvShape, RopeTable,
    Sampled, Stack, StepInputs, bf16, wire,
};

impl Backend for Cuda {
    type Rows = Rows;
    type Vector = Vector;
    type Dense = Dense;
    type Embedding = Embedding;
    type Experts = Experts;
    type Places = Places;
    type Kv = Kv;
    type Routes = Routes;
    type Work = Work;
    type Parts = Parts;
    type Ended = Ended;

    fn rows(&mut self, rows: usize, cols: usize) -> Rows {
        let made = Rows::new(&self.memory, rows, cols);
        self.made(made, |memory| Rows::nothing(memory, cols))
    }

    fn routes(&mut self, rows: usize, top_k: usize) -> Routes {
        self.top_k = top_k;
        let made = Routes::new(&self.memory, rows, top_k);
        self.made(made, |memory| Routes::nothing(memory, top_k))
    }

    fn work(&mut self, received: usize, choices: usize, shape: ExpertShape) -> Work {
        let made = Work::new(&self.memory, self.precision, self.family(), received, choices, shape);
        self.made(made, |memory| Work::nothing(memory, shape))
    }

    fn parts(&mut self, ranks: usize, bytes_max: usize) -> Parts {
        let made = Parts::new(&self.memory, ranks, bytes_max);
        self.made(made, |memory| Parts::nothing(memory, ranks))
    }

    fn kv(&mut self, shape: &KvShape) -> Kv {
        let made = Kv::new(&self.memory, self.precision, shape);
        self.made(made, |_| Kv::nothing(shape))
    }

    fn token_slots(&mut self, slots: usize) {
        let made = self.memory.zeroed(slots * 4);
        self.tokens = self.made(made, Memory::nothing);
        self.make_landings(slots);
    }

    fn vector(&mut self, source: Source<'_>) -> Result<Vector, KernelError> {
        need("a vector of bf16", source.bytes().len() % 2, 0)?;
        let values: Vec<f32> = bf16::values(source.bytes()).collect();
        source.release();
        Ok(Vector { buffer: self.memory.filled(&bytes_of(&values))?, len: values.len() })
    }

    fn packing(&self) -> String {
        format!("cuda-{LAYOUT}")
    }

    fn dense_bytes(&self, _used: DenseUse, rows: usize, cols: usize) -> usize {
        dense_bytes(rows, cols)
    }

    fn pack_dense(&self, _used: DenseUse, cols: usize, stack: &[Stack<'_>], out: &mut [u8]) -> Result<(), KernelError> {
        pack_dense(self.packers(), cols, stack, out)
    }

    fn hold_dense(&mut self, _used: DenseUse, rows: usize, cols: usize, packed: Packed) -> Result<Dense, KernelError> {
        need("a packed matrix", packed.len(), dense_bytes(rows, cols))?;
        let buffer = self.memory.filled(&packed)?;
        packed.release();
        Ok(Dense { buffer, rows, cols })
    }

    fn embedding(&mut self, cols: usize, table: EmbeddingSource) -> Result<Embedding, KernelError> {
        let bytes = table.table();
        let vocab = bytes.len().checked_div(cols * 2).unwrap_or(0);
        need("the embedding", bytes.len(), vocab * cols * 2)?;
        Ok(Embedding { buffer: self.memory.filled(bytes)?, cols, vocab })
    }

    fn experts(&mut self, slots: usize, shape: ExpertShape) -> Experts {
        let made = Experts::new(&self.memory, slots, shape);
        self.made(made, |memory| Experts::nothing(memory, shape))
    }

    fn expert_bytes(&self, experts: &Experts) -> usize {
        ExpertLayout::new(experts.shape()).bytes
    }

    fn pack_expert(&self, experts: &Experts, source: &ExpertSource<'_>, out: &mut [u8]) -> Result<(), KernelError> {
        pack_expert(self.packers(), experts.shape(), source, out)
    }

    fn hold_expert(&mut self, experts: &mut Experts, slot: usize, packed: Packed) -> Result<(), KernelError> {
        experts.hold(&self.memory, slot, &packed)?;
        packed.release();
        Ok(())
    }

    /// Packs it where the device reads it: while it is copied, the next one is packed.
    fn load_expert(
        &mut self,
        experts: &mut Experts,
        slot: usize,
        source: &ExpertSource<'_>,
    ) -> Result<(), KernelError> {
        let (shape, packers) = (experts.shape(), self.packers());
        experts.load(&self.memory, slot, |out| pack_expert(packers, shape, source, out))
    }

    fn clear_expert(&mut self, experts: &mut Experts, slot: usize) {
        let result = experts.clear(slot);
        self.note(result);
    }

    fn places(&mut self, places: &[(u32, u32)]) -> Places {
        let made = Places::new(&self.memory, places);
        self.made(made, Places::nothing)
    }

    fn set_deadline(&mut self, deadline: Instant) {
        self.memory.queue.set_deadline(Some(deadline));
    }

    fn begin(&mut self, inputs: &StepInputs, rope: &RopeTable) {
        self.drawn.clear();
        // Nothing that is recorded reads inputs of the last step any more.
        let result = self.submit().and_then(|()| {
            self.late.begin();
            self.inputs.begin(inputs, rope)
        });
        self.note(result);
    }

    fn copy_block(&mut self, kv: &mut Kv, pool: usize, from: u32, to: u32) {
        let result = kv.copy_block(pool, from, to);
        self.note(result);
    }

    fn embed(&mut self, table: &Embedding, out: &mut Rows) {
        let result = self.embed_rows(table, out);
        self.note(result);
    }

    fn norm(&mut self, x: &Rows, weight: &Vector, eps: f32, out: &mut Rows) {
        let result = self.norm_rows(x, weight, eps, out);
        self.note(result);
    }

    fn project(&mut self, x: &Rows, weight: &Dense, out: &mut Rows) {
        let result = self.project_rows(x, weight, out, false);
        self.note(result);
    }

    fn rotate_and_store(&mut self, qkv: &mut Rows, kv: &mut Kv, layer: KvLayer) {
        let result = self.rotate_and_store_rows(qkv, kv, layer);
        self.note(result);
    }

    fn attend(&mut self, qkv: &Rows, kv: &Kv, layer: KvLayer, sinks: &Vector, window: Option<u32>, out: &mut Rows) {
        let result = self.attend_rows(qkv, kv, layer, sinks, window, out);
        self.note(result);
    }

    fn project_add(&mut self, x: &Rows, weight: &Dense, residual: &mut Rows) {
        let result = self.project_rows(x, weight, residual, true);
        self.note(result);
    }

    fn route(&mut self, x: &Rows, router: &Dense, routes: &mut Routes) {
        let result = self.route_rows(x, router, routes);
        self.note(result);
    }

    fn dispatch(&mut self, x: &Rows, routes: &Routes, places: &Places, out: &mut Parts) {
        let result = self.dispatch_rows(x, routes, places, out);
        self.note(result);
        out.fault.clone_from(&self.error);
    }

    fn receive(&mut self, received: &Parts, experts: &Experts, work: &mut Work) {
        let result = self.receive_parts(received, experts, work);
        self.note(result);
    }

    fn gate_up(&mut self, experts: &Experts, work: &mut Work) {
        let result = self.gate_up_items(experts, work);
        self.note(result);
    }

    fn down(&mut self, experts: &Experts, work: &Work, out: &mut Parts) {
        let result = self.down_items(experts, work, out);
        self.note(result);
        out.fault.clone_from(&self.error);
    }

    fn combine(&mut self, returned: &Parts, routes: &Routes, places: &Places, residual: &mut Rows) {
        let result = self.combine_rows(returned, routes, places, residual);
        self.note(result);
    }

    fn gather(&mut self, x: &Rows, rows: &[u32], out: &mut Rows) {
        let result = self.gather_rows(x, rows, out);
        self.note(result);
    }

    fn sample(&mut self, logits: &Rows, draws: &[Draw]) {
        let result = self.sample_rows(logits, draws);
        self.note(result);
    }

    fn set_token(&mut self, slot: u32, token: u32) {
        let result = check("token slot", slot as usize, self.tokens.bytes() / 4)
            .and_then(|slot| self.tokens.upload(slot * 4, &token.to_le_bytes()));
        self.note(result);
    }

    fn end(&mut self) -> Ended {
        self.end_step()
    }

    fn is_done(&self, ended: &Ended) -> bool {
        ended.is_done()
    }

    fn result(&mut self, ended: Ended) -> Result<Vec<Sampled>, KernelError> {
        self.result_of(ended)
    }

    fn read(&mut self, rows: &Rows) -> Vec<f32> {
        let read = rows.read();
        self.made(read, |_| Vec::new())
    }

    fn write(&mut self, rows: &mut Rows, values: &[f32]) {
        let result = rows.write(values);
        self.note(result);
    }

    fn finish(&mut self) -> Result<(), KernelError> {
        if !self.broken {
            // Reading the status waits for all.
            let status = self.take_status();
            self.note(status);
        }
        match &self.error {
            Some(error) if self.broken => Err(error.clone()),
            _ => self.error.take().map_or(Ok(()), Err),
        }
    }

    /// Why the device makes no graphs, if it does not.
    fn take_warning(&mut self) -> Option<KernelError> {
        self.memory.queue.take_warning()
    }

    fn dispatch_record(&self, top_k: usize, hidden: usize) -> usize {
        wire::dispatch_record(self.precision, top_k, hidden)
    }

    fn combine_record(&self, hidden: usize) -> usize {
        hidden * wire::bytes(self.precision)
    }

    fn allocated(&self) -> u64 {
        self.memory.held()
    }
}
