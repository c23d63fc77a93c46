//! What a request must give: a pure function of the request, so that a wrong key, value, order or replay shows as a
//! wrong token.

use phalanx_planner::{FinishReason, Request, Want};
use phalanx_proto::{ConstraintStart, ConstraintTable, Sampling, TokenId, TokenLogprobs};

use crate::random::mix;

/// The hash of a prefix, which stands for the keys and values of its last position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixHash(pub(crate) u64);

impl PrefixHash {
    /// The hash of a prefix and one more token. Never the default, which stands for memory that nobody wrote.
    #[must_use]
    pub const fn then(self, token: TokenId) -> Self {
        Self(mix(self.0 ^ (token.0 as u64 + 1)) | 1)
    }

    /// The hash of all of these.
    #[must_use]
    pub fn of(tokens: &[TokenId]) -> Self {
        tokens.iter().fold(Self::default(), |hash, &token| hash.then(token))
    }
}

/// What decides a choice, beside the prefix that the keys and values hold.
#[derive(Clone, Debug)]
pub struct Chooser {
    sampling: Sampling,
    bias: u64,
    /// Hash of the prompt, as far as the sampling looks at it.
    prompt: PrefixHash,
    /// Hash of the answer so far, as far as the sampling looks at it.
    generated: PrefixHash,
    /// A constraint and its state.
    constraint: Option<(ConstraintTable, u32)>,
}

impl Chooser {
    /// Before the first token after `prompt` and `generated`. Parts that the sampling does not look at are not looked at.
    #[must_use]
    pub fn new(
        sampling: Sampling,
        bias: &[(TokenId, f32)],
        constraint: Option<(ConstraintTable, u32)>,
        prompt: &[TokenId],
        generated: &[TokenId],
    ) -> Self {
        let bias =
            bias.iter().fold(0, |hash, (token, bias)| mix(hash ^ u64::from(token.0)) ^ u64::from(bias.to_bits()));
        let prompt = if sampling.repetition_penalty == 1.0 { PrefixHash::default() } else { PrefixHash::of(prompt) };
        let mut chooser = Self { sampling, bias, prompt, generated: PrefixHash::default(), constraint };
        generated.iter().for_each(|&token| chooser.push(token));
        chooser
    }

    /// Whether what is chosen depends on the answer so far other than through keys and values.
    #[must_use]
    pub fn looks_back(&self) -> bool {
        self.sampling.looks_back() || self.constraint.is_some()
    }

    /// A token of the answer.
    pub fn push(&mut self, token: TokenId) {
        if self.sampling.looks_back() {
            self.generated = self.generated.then(token);
        }
        if let Some((table, state)) = &mut self.constraint {
            let next = table.class(token).and_then(|class| table.step(*state, class));
            // A token that the constraint refuses leaves it where it is: what is chosen then is wrong, and shows.
            *state = next.unwrap_or(*state);
        }
    }

    /// The token after a prefix, how likely it is if that is asked for, and the state is moved on.
    pub fn choose(&mut self, prefix: PrefixHash, vocab: u32) -> (TokenId, Option<TokenLogprobs>) {
        let Sampling { temperature, top_k, seed, choice, logprobs, .. } = self.sampling;
        let parameters = [
            prefix.0,
            u64::from(temperature.to_bits()),
            u64::from(top_k),
            seed,
            u64::from(choice),
            self.bias,
            self.prompt.0,
            self.generated.0,
        ];
        let hash = parameters.into_iter().fold(0, |hash, parameter| mix(hash ^ parameter));
        let first = u32::try_from(hash % u64::from(vocab)).expect("below the vocabulary");
        let allowed = |token: &u32| match &self.constraint {
            Some((table, state)) => {
                table.class(TokenId(*token)).is_some_and(|class| table.step(*state, class).is_some())
            }
            None => true,
        };
        let token = TokenId((first..vocab).chain(0..first).find(allowed).unwrap_or(first));
        self.push(token);
        let logprobs = logprobs.map(|n| {
            let top = (0..n.min(vocab)).map(|i| (TokenId((first + i) % vocab), -(i as f32)));
            TokenLogprobs { logprob: -((hash >> 48) as f32) / 1024.0, top: top.collect() }
        });
        (token, logprobs)
    }
}

/// The logits after a prefix, `[V]`.
pub fn logits(prefix: PrefixHash, vocab: u32) -> impl Iterator<Item = f32> {
    (0..vocab).map(move |token| (mix(prefix.0 ^ u64::from(token)) >> 48) as f32)
}

/// All that a request must give.
#[derive(Clone, Debug, PartialEq)]
pub struct Truth {
    /// Its tokens, and how likely they are if that is asked for.
    pub tokens: Vec<(TokenId, Option<TokenLogprobs>)>,
    /// Logits of its prompt, `[n, V]`, if it wants those.
    pub logits: Vec<f32>,
    /// Why it ends.
    pub reason: FinishReason,
}

impl Truth {
    /// What a request gives, alone and undisturbed.
    #[must_use]
    pub fn of(request: &Request, tables: &[ConstraintTable], vocab: u32) -> Self {
        let mut truth = Self { tokens: Vec::new(), logits: Vec::new(), reason: FinishReason::Length };
        let mut prefix = PrefixHash::default();
        for &token in &request.prompt {
            prefix = prefix.then(token);
            if request.want == Want::Logits {
                truth.logits.extend(logits(prefix, vocab));
            }
        }
        if request.want == Want::Logits {
            return truth;
        }
        let constraint = request
            .constraint
            .and_then(|ConstraintStart { table, state }| Some((tables.iter().find(|t| t.id == table)?.clone(), state)));
        let mut chooser = Chooser::new(request.sampling, &request.bias, constraint, &request.prompt, &[]);
        for _ in 0..request.max_tokens {
            let (token, logprobs) = chooser.choose(prefix, vocab);
            prefix = prefix.then(token);
            truth.tokens.push((token, logprobs));
            if request.stop_tokens.contains(&token) {
                truth.reason = FinishReason::Stop(token);
                break;
            }
        }
        truth
    }
}
