//! Cells whose ranks compute on GPUs, with the kernels of `csrc/` on the CPU in place of a GPU: what is proved is
//! everything but the driver and the hardware.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::sync::Arc;

use phalanx::local::{CellOptions, LocalCell};
use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::{self, Emulated};
use phalanx_model::Checkpoint;
use phalanx_planner::Want;
use phalanx_proto::{Bytes, DenseType, Precision, SeqId};
use phalanx_worker::device::{Device, GpuReport, Gpus, Processor};
use support::{Setup, bits, fixture, request, run};

/// A machine whose GPUs are emulated.
#[derive(Debug)]
struct EmulatedGpus(Emulated);

static GPUS: EmulatedGpus = EmulatedGpus(Emulated { fault: None, largest: None });

impl Gpus for EmulatedGpus {
    fn look(&self, index: u32) -> Result<GpuReport, KernelError> {
        Ok(GpuReport { arch: "emu".to_owned(), free: Bytes(8 << 30), memory_pool: format!("gpu/{index}") })
    }

    fn open(&self, _index: u32, _on_progress: &mut dyn FnMut(u64, u64)) -> Result<Arc<dyn cuda::Device>, KernelError> {
        Ok(Arc::new(self.0))
    }
}

/// The cell of a setup on GPUs.
fn on_gpus(setup: Setup, checkpoint: &Checkpoint, gpus: &'static dyn Gpus) -> CellOptions {
    let options = Setup { dense: DenseType::Bf16, ..setup }.options(checkpoint);
    let processor = Processor::Cuda { first: 0, count: 2 };
    CellOptions { device: Device { processor, gpus, ..options.device }, ..options }
}

fn small(workers: u32, precision: Precision) -> Setup {
    let setup = Setup::exact(workers);
    Setup { precision, seqs_max: 4, step_rows: 64, kv_tokens: 512, ..setup }
}

#[test]
fn the_bits_on_gpus_do_not_depend_on_workers_chunks_or_company() {
    for name in ["tiny-a", "tiny-b"] {
        let checkpoint = Arc::new(Checkpoint::open(&fixture(name)).unwrap());
        let vocab = checkpoint.config().vocab;
        let prompt = |n: u32| (0..n).map(|i| (i * 2_654_435 + n) % vocab).collect::<Vec<u32>>();
        for precision in [Precision::Exact, Precision::Fast] {
            let mut base = None;
            for (workers, chunk) in [(1, 64), (2, 64), (4, 5)] {
                let options = on_gpus(small(workers, precision), &checkpoint, &GPUS);
                let mut cell = LocalCell::start(&checkpoint, &options, |_, _| ()).unwrap();
                cell.set_chunk_max(chunk);
                let requests = (0..).zip([1, 7, 33]).map(|(seq, n)| request(seq, &prompt(n), 0, Want::Logits));
                let greedy = (10..).zip([3, 20]).map(|(seq, n)| request(seq, &prompt(n), 6, Want::Tokens));
                let given = run(&mut cell, requests.chain(greedy));
                let logits: Vec<Vec<u32>> = given.logits.values().map(|l| bits(l)).collect();
                assert!(logits.len() == 3 && given.tokens[&SeqId(11)].len() == 6);
                let base = base.get_or_insert_with(|| (logits.clone(), given.tokens.clone()));
                assert!((logits, given.tokens) == *base, "{name}, {precision}, {workers} workers, chunks of {chunk}");
            }
        }
    }
}
