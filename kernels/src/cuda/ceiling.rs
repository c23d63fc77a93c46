//! What a GPU can do at most, measured: the yardstick of benchmarks. Nothing here is on the way of a step.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig, sys};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError};
use half::bf16;

use crate::KernelError;

/// Bytes that are copied at a time: beyond any cache.
const COPY_BYTES: usize = 1 << 30;
/// Copies, or products, in a row.
const TIMES: usize = 8;
/// Rows and columns of the matrices.
const SIDE: usize = 8192;

/// What a GPU can do at most.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes a second that copying within its memory reads and writes, together.
    pub copy: f64,
    /// Operations (two a multiplication) a second of cuBLASLt's product of two large bf16 matrices; absent where there
    /// is no cuBLASLt.
    pub bf16: Option<f64>,
}

/// Measures a GPU again and again, so that a benchmark and its ceiling are of the same minute.
pub struct Yardstick {
    stream: Arc<CudaStream>,
    from: CudaSlice<u8>,
    to: CudaSlice<u8>,
    matrices: Option<Matrices>,
}

struct Matrices {
    library: CudaBlasLT,
    factors: [CudaSlice<bf16>; 2],
    product: CudaSlice<bf16>,
}

impl fmt::Debug for Yardstick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Yardstick").finish_non_exhaustive()
    }
}

fn failed(error: DriverError) -> KernelError {
    KernelError::Device { what: "be measured", why: error.to_string() }
}

impl Yardstick {
    /// Takes the memory that is read, about 3 GB, on the GPU of this number, which is there: something computes on it.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn new(ordinal: usize) -> Result<Self, KernelError> {
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let stream = context.new_stream().map_err(failed)?;
        let [from, to] = [(); 2].map(|()| stream.alloc_zeros(COPY_BYTES).map_err(failed));
        let matrices = Matrices::new(&stream)?;
        Ok(Self { from: from?, to: to?, matrices, stream })
    }

    /// Measures once, about a tenth of a second. Nothing else should run on the GPU meanwhile.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn measure(&mut self) -> Result<Ceilings, KernelError> {
        let Self { stream, from, to, matrices } = self;
        let seconds = timed(stream, || stream.memcpy_dtod(from, to).map_err(failed))?;
        let copy = (2 * COPY_BYTES) as f64 / seconds;
        let product = |matrices: &mut Matrices| timed(stream, || matrices.multiply());
        let seconds = matrices.as_mut().map(product).transpose()?;
        Ok(Ceilings { copy, bf16: seconds.map(|seconds| 2.0 * (SIDE as f64).powi(3) / seconds) })
    }
}

impl Matrices {
    /// `None` where there is no cuBLASLt.
    fn new(stream: &Arc<CudaStream>) -> Result<Option<Self>, KernelError> {
        // SAFETY: looks for the library by its names and loads it; its initialisers are trusted like any system library's.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        // Zeros would cost less power than numbers do, and a GPU's clock follows its power.
        let numbers: Vec<bf16> =
            (0..SIDE * SIDE).map(|i| bf16::from_f32((i * 37 % 255) as f32 / 128.0 - 1.0)).collect();
        let [a, b] = [(); 2].map(|()| stream.clone_htod(&numbers).map_err(failed));
        let product = stream.alloc_zeros(SIDE * SIDE).map_err(failed)?;
        let library = CudaBlasLT::new(Arc::clone(stream))
            .map_err(|error| KernelError::Device { what: "multiply by cuBLASLt", why: error.to_string() })?;
        Ok(Some(Self { library, factors: [a?, b?], product }))
    }

    /// Enqueues a product, of two matrices whose columns are contiguous along the sum.
    fn multiply(&mut self) -> Result<(), KernelError> {
        let side = SIDE as i64;
        let config = MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: SIDE as u64,
            n: SIDE as u64,
            k: SIDE as u64,
            alpha: 1.0,
            lda: side,
            ldb: side,
            beta: 0.0,
            ldc: side,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        let [a, b] = &self.factors;
        // SAFETY: all three matrices have SIDE rows and columns, as the configuration says.
        unsafe { self.library.matmul(config, a, b, &mut self.product, None, None) }
            .map_err(|error| KernelError::Device { what: "multiply by cuBLASLt", why: error.to_string() })
    }
}

/// Seconds of one, of several in a row.
fn timed(stream: &CudaStream, mut enqueue: impl FnMut() -> Result<(), KernelError>) -> Result<f64, KernelError> {
    enqueue()?;
    stream.synchronize().map_err(failed)?;
    let begun = Instant::now();
    for _ in 0..TIMES {
        enqueue()?;
    }
    stream.synchronize().map_err(failed)?;
    Ok(begun.elapsed().as_secs_f64() / TIMES as f64)
}
