//! gpt-oss, written once over a backend and a set of collectives.
