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
#include "../receive.cu"
#include "../rms_norm.cu"
#include "../rope.cu"
#include "../router.cu"
#include "../sample.cu"
#include "../slots.cu"
}

namespace hopper_dense {
#include "../dense_wgmma.cu"
}

namespace hopper {
#include "../experts_wgmma.cu"
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

// Of Hopper's kernels those for 32 items, and for 8 and 32 tokens, alone.
#define PLANTED
#undef EMU_SUFFIX
#define EMU_SUFFIX "!nibbles"
#define PLANT_NIBBLES
namespace hopper_with_swapped_nibbles {
#include "../experts_wgmma.cu"
}
#undef PLANT_NIBBLES

#undef EMU_SUFFIX
#define EMU_SUFFIX "!wait"
#define PLANT_WAIT
namespace hopper_without_wait {
#include "../experts_wgmma.cu"
}
namespace hopper_dense_without_wait {
#include "../dense_wgmma.cu"
}
#undef PLANT_WAIT

#undef EMU_SUFFIX
#define EMU_SUFFIX "!phase"
#define PLANT_PHASE
namespace hopper_with_the_phase_before {
#include "../experts_wgmma.cu"
}
#undef PLANT_PHASE

#undef EMU_SUFFIX
#define EMU_SUFFIX "!stage"
#define PLANT_STAGE
namespace hopper_with_the_next_stage {
#include "../experts_wgmma.cu"
}
#undef PLANT_STAGE

#undef EMU_SUFFIX
#define EMU_SUFFIX "!stride"
#define PLANT_STRIDE
namespace hopper_with_another_stride {
#include "../experts_wgmma.cu"
}
#undef PLANT_STRIDE

#undef EMU_SUFFIX
#define EMU_SUFFIX "!fence"
#define PLANT_FENCE
namespace hopper_without_fence {
#include "../experts_wgmma.cu"
}
namespace hopper_dense_without_fence {
#include "../dense_wgmma.cu"
}
#undef PLANT_FENCE

#undef EMU_SUFFIX
#define EMU_SUFFIX "!registers"
#define PLANT_REGISTERS
namespace hopper_with_registers_too_early {
#include "../experts_wgmma.cu"
}
namespace hopper_dense_with_registers_too_early {
#include "../dense_wgmma.cu"
}
#undef PLANT_REGISTERS

#undef EMU_SUFFIX
#define EMU_SUFFIX "!early"
#define PLANT_EARLY
namespace hopper_with_stages_too_early {
#include "../experts_wgmma.cu"
}
namespace hopper_dense_with_stages_too_early {
#include "../dense_wgmma.cu"
}
#undef PLANT_EARLY

#undef EMU_SUFFIX
#define EMU_SUFFIX "!meet"
#define PLANT_MEET
namespace hopper_that_does_not_meet {
#include "../experts_wgmma.cu"
}
namespace hopper_dense_that_leaves_what_has_met {
#include "../dense_wgmma.cu"
}
#undef PLANT_MEET
