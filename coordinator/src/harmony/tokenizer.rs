//! Text to tokens and back, with the vocabulary that is embedded in the binary.

use phalanx_proto::TokenId;
use tiktoken_rs::CoreBPE;

/// Longer runs of white space are encoded in parts, for the vocabulary's pattern takes a stack as deep as the run.
const WHITE_SPACE_MAX: usize = 100_000;
/// Bytes after which text is cut where that leaves its tokens as they are.
const PART_BYTES: usize = 1 << 16;

/// An id that the vocabulary does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("token {0} is not in the vocabulary, give ids below {size}", size = super::special::VOCAB_SIZE)]
pub struct UnknownToken(pub TokenId);

/// The `o200k_harmony` vocabulary. Copies share it.
#[derive(Clone, Copy)]
pub struct Tokenizer {
    bpe: &'static CoreBPE,
}

impl Tokenizer {
    /// The process's one tokenizer. The first call parses the vocabulary, which takes about a second.
    #[must_use]
    pub fn shared() -> Self {
        Self { bpe: tiktoken_rs::o200k_harmony_singleton() }
    }

    /// The tokens of `text`, in which control markers such as `<|end|>` are text like any other.
    #[must_use]
    pub fn encode_ordinary(&self, text: &str) -> Vec<TokenId> {
        self.encode_parts(text).flatten().collect()
    }

    /// The same tokens part by part, each encoded when it is asked for.
    pub(super) fn encode_parts(self, text: &str) -> impl Iterator<Item = Vec<TokenId>> {
        parts(text).map(move |part| self.bpe.encode_ordinary(part).into_iter().map(TokenId).collect())
    }

    /// The bytes of one token; a control token has the bytes of its marker.
    pub fn token_bytes(&self, token: TokenId) -> Result<Vec<u8>, UnknownToken> {
        self.bpe.decode_bytes(&[token.0]).map_err(|_| UnknownToken(token))
    }

    /// The bytes of `tokens`, which need not be whole UTF-8.
    pub fn decode_bytes(&self, tokens: &[TokenId]) -> Result<Vec<u8>, UnknownToken> {
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        for &token in tokens {
            bytes.extend(self.token_bytes(token)?);
        }
        Ok(bytes)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokenizer(o200k_harmony)")
    }
}

/// `text`, cut within runs of more than [`WHITE_SPACE_MAX`] white space characters, and after [`PART_BYTES`] before a
/// space that ends a word: nothing that the vocabulary's pattern matches has a space behind anything but white space.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let mut run = 0;
        let cut = rest.char_indices().find(|&(at, c)| {
            if c == ' ' && run == 0 && at >= PART_BYTES {
                return true;
            }
            run = if c.is_whitespace() { run + 1 } else { 0 };
            run > WHITE_SPACE_MAX
        });
        let (part, after) = rest.split_at(cut.map_or(rest.len(), |(at, _)| at));
        rest = after;
        (!part.is_empty()).then_some(part)
    })
}
