//! Which instructions to use, decided once when the backend is made.

use super::lanes::{Kernel, Lanes as _, Portable};
#[cfg(target_arch = "x86_64")]
use super::lanes::{
    avx2::Avx2,
    avx512::{self, Avx512},
};

/// An instruction set. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Whatever the compiler makes of plain loops.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
    /// AVX-512 with VNNI and VBMI.
    Avx512Vbmi,
}

impl Isa {
    /// Every instruction set, best last.
    const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Vbmi];

    /// The best instruction set of this processor.
    #[must_use]
    pub fn detect() -> Self {
        Self::ALL.into_iter().rfind(|isa| Simd::new(*isa).is_some()).unwrap_or(Self::Portable)
    }

    /// The instruction sets of this processor, best last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| Simd::new(*isa).is_some()).collect()
    }

    /// The name shown to people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Vbmi => "avx512-vbmi",
        }
    }
}

/// An instruction set that this processor has: each variant holds the proof.
#[derive(Clone, Copy, Debug)]
pub(super) enum Simd {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<{ avx512::BASE }>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512<{ avx512::VNNI }>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi(Avx512<{ avx512::VBMI }>),
}

impl Simd {
    /// The best of this processor.
    pub(super) fn detect() -> Self {
        Self::new(Isa::detect()).unwrap_or(Self::Portable(Portable))
    }

    /// `None` if the processor lacks it.
    pub(super) fn new(isa: Isa) -> Option<Self> {
        match isa {
            Isa::Portable => Some(Self::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Avx512::detect().map(Self::Avx512Vnni),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => Avx512::detect().map(Self::Avx512Vbmi),
            #[cfg(not(target_arch = "x86_64"))]
            _ => None,
        }
    }

    /// Runs a kernel compiled for this instruction set.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable(lanes) => lanes.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(lanes) => lanes.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => lanes.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(lanes) => lanes.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi(lanes) => lanes.run(kernel),
        }
    }
}
