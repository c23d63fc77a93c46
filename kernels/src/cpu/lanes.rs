//! Sixteen lanes of f32 or i32, one for each output row of a tile.
//!
//! A kernel is written once over [`Lanes`] and compiled for every instruction set. Lanes never mix: there is no
//! horizontal operation, so what a lane computes is the same everywhere. Work on single elements (SwiGLU,
//! softmax, rounding) is plain scalar code that the compiler vectorises inside a kernel: it consists of
//! IEEE operations only, and those are the same scalar or not.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
mod portable;

pub(super) use portable::Portable;

/// Lanes of a vector, rows of a tile.
pub(super) const LANES: usize = 16;

/// The values of the sixteen MXFP4 codes.
//= OCP Microscaling Formats 1.0, table 5 (E2M1)
pub(super) const CODE_VALUES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Twice the value of each code, plus [`CODE_OFFSET`]: an unsigned byte.
pub(super) const CODE_BYTES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// Added to the bits of `2^(n - 127)`, `n` at least 1: half of what lies between it and twice it, where integers of either
/// sign may be added to the bits.
pub(super) const HALF_WAY: i32 = 0x0040_0000;

/// See [`CODE_BYTES`].
pub(super) const CODE_OFFSET: i32 = 12;

/// A computation written once for all instruction sets. `run` must be `#[inline(always)]`, and so must be what
/// it calls with lanes, for then everything is compiled with the instructions of `L`.
pub(super) trait Kernel {
    /// What it returns.
    type Output;

    /// Runs with `lanes`.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// An instruction set; a value proves that the processor has it.
pub(super) trait Lanes: Copy {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// Whether there are registers for 24 vectors at once; else for 6.
    const WIDE: bool;

    /// Runs a kernel compiled for this instruction set.
    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    /// `v` in every lane.
    fn splat(self, v: f32) -> Self::F;
    /// A number for each lane.
    fn load(self, v: &[f32; LANES]) -> Self::F;
    /// A bf16 for each lane, widened.
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F;
    /// An f16 for each lane, widened.
    fn load_f16(self, v: &[u16; LANES]) -> Self::F;
    /// Writes a number from each lane.
    fn store(self, v: Self::F, out: &mut [f32; LANES]);
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// `2^(byte - 127)` for bytes up to 254; `2^-127` is a denormal number and exact.
    fn scales(self, bytes: &[u8; LANES]) -> Self::F;
    /// Numbers for counting in steps of `2^(byte - 149)`: an integer below `2^22` added to the bits of one adds as many
    /// steps to it, exactly. For bytes up to 253.
    fn steps(self, bytes: &[u8; LANES]) -> Self::F;
    /// The bits of `steps` plus `v` in every lane.
    fn count_from(self, steps: Self::F, v: i32) -> Self::I;
    /// What has been counted: the number with these bits, less `steps`.
    fn counted(self, count: Self::I, steps: Self::F) -> Self::F;
    /// Eight MXFP4 codes, or four bytes, for each lane.
    fn load_codes(self, v: &[u32; LANES]) -> Self::I;
    /// The value of code `nibble` (0 is the lowest) of each lane.
    fn code_value(self, codes: Self::I, nibble: u32) -> Self::F;
    /// [`CODE_BYTES`] of the codes in the low (or high) nibbles of each lane's four bytes.
    fn code_bytes(self, codes: Self::I, high: bool) -> Self::I;
    /// `v` in every lane.
    fn splat_i32(self, v: i32) -> Self::I;
    /// `acc +` the products of four unsigned bytes (at most 24) and four signed bytes, summed.
    fn dot(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I;
    /// `acc +` the products of four unsigned bytes and four signed bytes (not -128), summed.
    fn dot_bytes(self, acc: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I;
    /// Asks for a cache line that will be read in a while; any address will do.
    fn prefetch(self, line: *const u8);
    /// As f32; exact below 2^24.
    fn to_f32(self, v: Self::I) -> Self::F;
}
