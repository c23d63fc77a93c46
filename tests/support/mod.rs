//! What the whole-cluster tests share.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod golden;
#[allow(clippy::duplicate_mod, reason = "a test binary may have `server` beside this")]
mod paths;

use std::collections::BTreeMap;
use std::sync::Arc;

use phalanx::local::{CellOptions, LocalCell};
use phalanx_model::Checkpoint;
use phalanx_planner::{Event, Request, Want};
use phalanx_proto::{DenseType, Limits, Precision, SeqId, TokenId};
use phalanx_worker::collectives::nccl::ExchangeRequest;
use phalanx_worker::device::{Device, DriverGpus, Processor};

pub(crate) use paths::fixture;

/// How a test's cell is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) workers: u32,
    pub(crate) precision: Precision,
    pub(crate) dense: DenseType,
    pub(crate) threads: u32,
    pub(crate) seqs_max: u32,
    pub(crate) step_rows: u32,
    pub(crate) kv_tokens: u32,
}

impl Setup {
    pub(crate) fn exact(workers: u32) -> Self {
        Self {
            workers,
            precision: Precision::Exact,
            dense: DenseType::Bf16,
            threads: 1,
            seqs_max: 8,
            step_rows: 256,
            kv_tokens: 4608,
        }
    }

    pub(crate) fn fast(workers: u32) -> Self {
        Self { precision: Precision::Fast, dense: DenseType::Q8, ..Self::exact(workers) }
    }

    pub(crate) fn start(self, checkpoint: &Arc<Checkpoint>) -> LocalCell {
        LocalCell::start(checkpoint, &self.options(checkpoint), |_, _| ()).unwrap()
    }

    /// On the GPU that `PHALANX_GPU` numbers, if it does; there dense weights are bf16.
    pub(crate) fn options(self, checkpoint: &Checkpoint) -> CellOptions {
        let limits = Limits::new(checkpoint.config(), self.seqs_max, self.step_rows, self.kv_tokens);
        let gpu = std::env::var("PHALANX_GPU").ok().map(|ordinal| ordinal.parse().unwrap());
        let processor = gpu.map_or(Processor::Cpu, |first| Processor::Cuda { first, count: 1 });
        let device = Device {
            processor,
            precision: self.precision,
            dense: if gpu.is_some() { DenseType::Bf16 } else { self.dense },
            threads: self.threads,
            pin: None,
            weight_cache: false,
            isa: None,
            gpus: &DriverGpus,
            exchange: ExchangeRequest::Auto,
        };
        CellOptions { workers: self.workers, device, limits }
    }
}

pub(crate) fn request(seq: u64, prompt: &[u32], max_tokens: u32, want: Want) -> Request {
    let prompt = prompt.iter().map(|&id| TokenId(id)).collect();
    Request { want, ..Request::greedy(SeqId(seq), prompt, max_tokens) }
}

/// What each sequence gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Given {
    pub(crate) tokens: BTreeMap<SeqId, Vec<u32>>,
    pub(crate) logits: BTreeMap<SeqId, Vec<f32>>,
}

/// Runs all requests together to their ends.
pub(crate) fn run(cell: &mut LocalCell, requests: impl IntoIterator<Item = Request>) -> Given {
    for request in requests {
        cell.submit(request).unwrap();
    }
    let mut given = Given::default();
    cell.run(|event| match event {
        Event::Token { seq, token, .. } => given.tokens.entry(seq).or_default().push(token.0),
        Event::Logits { seq, logits } => given.logits.entry(seq).or_default().extend(logits),
        Event::Started { .. } | Event::Finished { .. } => {}
    })
    .unwrap();
    given
}

/// Raw bits, so that equality means equality.
pub(crate) fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}
