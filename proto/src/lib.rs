//! The words of Phalanx: ids, fences, plans, results, model shape, layout, memory.
