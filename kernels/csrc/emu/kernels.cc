// Every kernel for the CPU, and again those in which a fault is planted; tests/conformance/faults.rs wants them seen.
#include "fibers.cc"

#include "../ptx.cuh"

#define EMU_SUFFIX ""
namespace kernels {
#include "../attention.cu"
#include "../dense.cu"
#include "../embed.cu"
#include "../exchange.cu"
#include "../experts.cu"
#include "../rms_norm.cu"
#include "../rope.cu"
#include "../router.cu"
#include "../sample.cu"
#include "../slots.cu"
}

#undef EMU_SUFFIX
#define EMU_SUFFIX "!barrier"
#define PLANT_BARRIER
namespace without_barrier {
#include "../attention.cu"
}
#undef PLANT_BARRIER

#undef EMU_SUFFIX
#define EMU_SUFFIX "!window"
#define PLANT_WINDOW
namespace with_another_window {
#include "../attention.cu"
}
#undef PLANT_WINDOW

#undef EMU_SUFFIX
#define EMU_SUFFIX "!nibbles"
#define PLANT_NIBBLES
namespace with_swapped_nibbles {
#include "../experts.cu"
}
#undef PLANT_NIBBLES
