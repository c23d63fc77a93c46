//! What a decode step must read, whoever computes it: the byte floor.
//!
//! For `B` sequences with `C` tokens of context each, a step reads, once:
//!
//! - dense weights: per layer q, k, v and out projections, `2·H·Nq·D + 2·H·Nkv·D` values, and the unembedding, `V·H`
//!   values; 2 bytes a value (bf16) or 34/32 (q8: 32 int8 and an f16 scale);
//! - routers: `E·H` bf16 values a layer;
//! - experts: `E·(1 - (1 - K/E)^B)` of them a layer, as many as `B` tokens visit if each draws `K` of `E` evenly;
//!   each has `3·H·I` MXFP4 values of 17/32 bytes and `2·I + H` bf16 biases;
//! - keys and values: `2·Nkv·D` bf16 values for each token in sight, of each sequence; a window layer (every other one)
//!   sees no further than its window.
//!
//! Norms, the biases of the projections, sinks and embedding rows are left out: less than a thousandth.

use super::json::Json;

/// The widths of a model, in the letters of the rest of the house.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) hidden: f64,
    pub(crate) inter: f64,
    pub(crate) layers: f64,
    pub(crate) experts: f64,
    pub(crate) topk: f64,
    pub(crate) heads: f64,
    pub(crate) kv: f64,
    pub(crate) hd: f64,
    pub(crate) vocab: f64,
    pub(crate) window: f64,
}

impl Shape {
    /// From what `weights.py` reports.
    pub(crate) fn from_json(json: &Json) -> Result<Shape, String> {
        Ok(Shape {
            hidden: json.number("hidden")?,
            inter: json.number("inter")?,
            layers: json.number("layers")?,
            experts: json.number("experts")?,
            topk: json.number("topk")?,
            heads: json.number("heads")?,
            kv: json.number("kv")?,
            hd: json.number("hd")?,
            vocab: json.number("vocab")?,
            window: json.number("window")?,
        })
    }

    /// Bytes that a decode step of `batch` sequences reads, with `context` tokens of each in sight.
    pub(crate) fn decode_bytes(&self, dense_bytes: f64, batch: f64, context: f64) -> f64 {
        let attention = 2.0 * self.hidden * self.hd * (self.heads + self.kv);
        let dense = dense_bytes * (self.layers * attention + self.vocab * self.hidden);
        let routers = 2.0 * self.layers * self.experts * self.hidden;
        let expert = 3.0 * self.hidden * self.inter * 17.0 / 32.0 + 2.0 * (2.0 * self.inter + self.hidden);
        let visited = self.experts * (1.0 - (1.0 - self.topk / self.experts).powf(batch));
        // Layers begin with a window layer and take turns.
        let (window_layers, full_layers) = ((self.layers / 2.0).ceil(), (self.layers / 2.0).floor());
        let in_sight = full_layers * context + window_layers * context.min(self.window);
        let kv = batch * in_sight * 2.0 * self.kv * self.hd * 2.0;
        dense + routers + self.layers * visited * expert + kv
    }
}

/// The precision of the dense weights, the same for every engine of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dense {
    Q8,
    Bf16,
}

impl Dense {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Dense::Q8 => "q8",
            Dense::Bf16 => "bf16",
        }
    }

    /// Bytes of one value.
    pub(crate) const fn bytes(self) -> f64 {
        match self {
            Dense::Q8 => 34.0 / 32.0,
            Dense::Bf16 => 2.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full_20b() -> Shape {
        Shape {
            hidden: 2880.0,
            inter: 2880.0,
            layers: 24.0,
            experts: 32.0,
            topk: 4.0,
            heads: 64.0,
            kv: 8.0,
            hd: 64.0,
            vocab: 201_088.0,
            window: 128.0,
        }
    }

    #[test]
    fn the_20b_reads_what_is_known_of_it() {
        let shape = full_20b();
        let gb = |dense: Dense, batch, context| shape.decode_bytes(dense.bytes(), batch, context) / 1e9;
        assert!((gb(Dense::Bf16, 1.0, 0.0) - 3.71).abs() < 0.01, "{}", gb(Dense::Bf16, 1.0, 0.0));
        assert!((gb(Dense::Q8, 1.0, 0.0) - 2.57).abs() < 0.01, "{}", gb(Dense::Q8, 1.0, 0.0));
        // 8 sequences visit 21 of 32 experts: 6.67 GB of them.
        let experts = gb(Dense::Bf16, 8.0, 0.0) - gb(Dense::Bf16, 1.0, 0.0);
        assert!((experts - 13.236e-3 * 24.0 * (21.0 - 4.0)).abs() < 0.02, "{experts}");
    }

    #[test]
    fn context_grows_in_full_layers_and_stops_at_the_window_in_the_others() {
        let shape = full_20b();
        let bytes = |context| shape.decode_bytes(2.0, 1.0, context);
        assert_eq!(bytes(1000.0) - bytes(999.0), 24_576.0);
        assert_eq!(bytes(128.0) - bytes(127.0), 2.0 * 24_576.0);
    }

    #[test]
    fn every_expert_is_visited_by_many_sequences() {
        let shape = Shape { layers: 1.0, ..full_20b() };
        let more = shape.decode_bytes(2.0, 1e4, 0.0) - shape.decode_bytes(2.0, 1.0, 0.0);
        assert!((more / 1e6 - 28.0 * 13.236).abs() < 0.1, "{more}");
    }

    #[test]
    fn a_shape_that_lacks_a_width_says_which() {
        let lacks = Json::parse(r#"{"hidden":1,"inter":1}"#).unwrap();
        assert!(Shape::from_json(&lacks).unwrap_err().contains("`layers`"));
    }
}
