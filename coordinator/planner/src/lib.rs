//! Decides: admission, schedule, blocks, routing; values in, values out.
