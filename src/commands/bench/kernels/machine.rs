//! What is measured, and what it can do at most.

use anyhow::Result;
use phalanx_kernels::cpu::ceiling::Yardstick;
use phalanx_kernels::cuda::ceiling as cuda;
use phalanx_kernels::{Backend, Cpu, Cuda, HostParts, Precision};

use super::cases::Arithmetic;

/// What a machine can do at most. Where something cannot be measured, its number is NaN.
pub(super) struct Ceiling {
    /// Bytes read from memory a second.
    pub(super) read: f64,
    /// Operations (two a multiplication) a second, of each arithmetic that this machine's ops use.
    pub(super) peaks: Vec<(Arithmetic, f64)>,
}

impl Ceiling {
    pub(super) fn of_cpu(yardstick: &Yardstick, cpu: &Cpu) -> Self {
        let measured = yardstick.measure(cpu);
        let peaks =
            vec![(Arithmetic::Mxfp4, measured.mxfp4), (Arithmetic::Q8, measured.q8), (Arithmetic::F32, measured.f32)];
        Self { read: measured.read, peaks }
    }

    /// What copying reads and writes is the ceiling of what an op reads, as is usual.
    pub(super) fn of_gpu(yardstick: &mut cuda::Yardstick) -> Result<Self> {
        let cuda::Ceilings { copy, bf16 } = yardstick.measure()?;
        Ok(Self { read: copy, peaks: bf16.map(|peak| (Arithmetic::Bf16, peak)).into_iter().collect() })
    }

    /// The middle of several, number by number.
    pub(super) fn median(all: &[Self]) -> Self {
        let kinds = all.first().map_or(&[][..], |first| &first.peaks);
        let peaks = kinds.iter().map(|&(kind, _)| (kind, median(all.iter().map(|one| one.peak(kind)))));
        Self { read: median(all.iter().map(|one| one.read)), peaks: peaks.collect() }
    }

    /// The peak of an arithmetic.
    pub(super) fn peak(&self, arithmetic: Arithmetic) -> f64 {
        self.peaks.iter().find(|(of, _)| *of == arithmetic).map_or(f64::NAN, |(_, peak)| *peak)
    }
}

/// A backend that can be measured.
pub(super) trait Machine: Backend {
    /// What bounds arithmetic that is not done on weights.
    const FLOATS: Arithmetic;

    /// Most bytes of keys and values that are held for a case.
    const MOST_KV_BYTES: usize;

    /// How often an op is done before it is handed over, if it meets the same memory again after `period` times.
    fn together(period: usize) -> usize;

    /// Hands what is enqueued to the device.
    fn hand_over(&mut self) -> Result<()>;

    /// Records of one rank, as if they had been received.
    fn received(&mut self, records: Vec<u8>) -> Result<Self::Parts>;

    /// How much is rounded on the way.
    fn rounds(&self) -> Precision;

    /// Bytes of a key's or value's number.
    fn kv_bytes(&self) -> usize {
        match self.rounds() {
            Precision::Exact => 4,
            Precision::Fast => 2,
        }
    }
}

impl Machine for Cpu {
    const FLOATS: Arithmetic = Arithmetic::F32;
    const MOST_KV_BYTES: usize = 512 << 20;

    fn together(_period: usize) -> usize {
        1
    }

    fn hand_over(&mut self) -> Result<()> {
        Ok(())
    }

    fn received(&mut self, records: Vec<u8>) -> Result<HostParts> {
        Ok(HostParts { by_rank: vec![records] })
    }

    fn rounds(&self) -> Precision {
        self.precision()
    }
}

impl Machine for Cuda {
    const FLOATS: Arithmetic = Arithmetic::Bf16;
    const MOST_KV_BYTES: usize = 8 << 30;

    fn together(period: usize) -> usize {
        // Enough for what lies between two graphs not to count, and the next are like these: they are the same graph.
        period * 32_usize.div_ceil(period)
    }

    fn hand_over(&mut self) -> Result<()> {
        Ok(self.submit()?)
    }

    fn received(&mut self, records: Vec<u8>) -> Result<Self::Parts> {
        let mut parts = self.parts(1, records.len());
        parts.upload(&HostParts { by_rank: vec![records] })?;
        Ok(parts)
    }

    fn rounds(&self) -> Precision {
        self.precision()
    }
}

/// The middle value; NaN if there is none.
pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
