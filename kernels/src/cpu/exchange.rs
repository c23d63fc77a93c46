//! Rows to the ranks of their experts, and results back home.

use super::isa::Simd;
use super::kv::check;
use super::lanes::{Kernel, Lanes};
use super::router::Routes;
use crate::threads::Threads;
use crate::{HostParts, KernelError, NO_SLOT, Precision, wire};

/// Where each expert of a layer lives, `[E]` of (rank, slot).
#[derive(Debug)]
pub struct Places {
    places: Vec<(u32, u32)>,
}

impl Places {
    pub(super) fn new(places: &[(u32, u32)]) -> Self {
        Self { places: places.to_vec() }
    }

    fn of(&self, expert: u32) -> Result<(u32, u32), KernelError> {
        Ok(self.places[check("expert", expert as usize, self.places.len())?])
    }
}

/// Writes each row of `x: [T, H]` once into the part of every rank that holds one of its experts.
pub(super) fn dispatch(
    simd: Simd,
    threads: &Threads,
    precision: Precision,
    x: &[f32],
    routes: &Routes,
    places: &Places,
    out: &mut HostParts,
) -> Result<(), KernelError> {
    let top_k = routes.top_k();
    let hidden = x.len().checked_div(routes.len()).unwrap_or(0);
    let record = wire::dispatch_record(precision, top_k, hidden);
    let ranks = out.by_rank.len();
    let mut rows_of_rank = vec![Vec::new(); ranks];
    for row in 0..routes.len() {
        for &expert in routes.experts(row) {
            let rows = &mut rows_of_rank[check("rank", places.of(expert)?.0 as usize, ranks)?];
            if rows.last() != Some(&row) {
                rows.push(row);
            }
        }
    }
    for (rank, (part, rows)) in (0..).zip(out.by_rank.iter_mut().zip(&rows_of_rank)) {
        part.clear();
        part.resize(rows.len() * record, 0);
        let work = rows.len() * hidden;
        threads.each_chunk(part, record, work, |i, bytes| {
            let row = rows[i];
            let (slots, values) = bytes.split_at_mut(top_k * 4);
            for (out, &expert) in slots.as_chunks_mut().0.iter_mut().zip(routes.experts(row)) {
                let here = places.of(expert).ok().filter(|place| place.0 == rank);
                *out = here.map_or(NO_SLOT, |place| place.1).to_le_bytes();
            }
            simd.run(Encode { precision, x: &x[row * hidden..(row + 1) * hidden], out: values });
        });
    }
    Ok(())
}

/// One row to the wire.
struct Encode<'a> {
    precision: Precision,
    x: &'a [f32],
    out: &'a mut [u8],
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        wire::encode(self.precision, self.x, self.out);
    }
}

/// `residual: [T, H] += sum over k ascending of weight_k * returned_k`: the sum from zero, one fused multiply-add each.
pub(super) fn combine(
    simd: Simd,
    threads: &Threads,
    precision: Precision,
    returned: &HostParts,
    routes: &Routes,
    places: &Places,
    residual: &mut [f32],
) -> Result<(), KernelError> {
    let hidden = residual.len().checked_div(routes.len()).unwrap_or(0);
    let record = hidden * wire::bytes(precision);
    let ranks = returned.by_rank.len();
    let mut taken = vec![0usize; ranks];
    let mut results: Vec<&[u8]> = Vec::with_capacity(routes.len() * routes.top_k());
    for row in 0..routes.len() {
        for &expert in routes.experts(row) {
            let rank = check("rank", places.of(expert)?.0 as usize, ranks)?;
            let start = taken[rank] * record;
            let bytes = returned.by_rank[rank].get(start..start + record);
            results.push(bytes.ok_or(KernelError::Received { rank, what: "fewer results than rows" })?);
            taken[rank] += 1;
        }
    }
    for (rank, (part, taken)) in returned.by_rank.iter().zip(taken).enumerate() {
        if part.len() != taken * record {
            return Err(KernelError::Received { rank, what: "more results than rows" });
        }
    }
    let work = results.len() * hidden;
    threads.each_chunk(residual, hidden, work, |row, residual| {
        let results = &results[row * routes.top_k()..(row + 1) * routes.top_k()];
        simd.run(Combine { precision, results, weights: routes.weights(row), residual });
    });
    Ok(())
}

/// One row's results.
struct Combine<'a> {
    precision: Precision,
    /// `[K]`
    results: &'a [&'a [u8]],
    /// `[K]`
    weights: &'a [f32],
    residual: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        const STRETCH: usize = 64;
        let size = wire::bytes(self.precision);
        for (i, residual) in self.residual.chunks_mut(STRETCH).enumerate() {
            let mut sums = [0.0f32; STRETCH];
            let mut values = [0.0f32; STRETCH];
            let bytes = i * STRETCH * size..(i * STRETCH + residual.len()) * size;
            for (result, weight) in self.results.iter().zip(self.weights) {
                wire::decode(self.precision, &result[bytes.clone()], &mut values);
                for (sum, value) in sums.iter_mut().zip(&values) {
                    *sum = value.mul_add(*weight, *sum);
                }
            }
            for (residual, sum) in residual.iter_mut().zip(&sums) {
                *residual += sum;
            }
        }
    }
}
