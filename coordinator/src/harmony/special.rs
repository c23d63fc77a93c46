//! The control tokens of `o200k_harmony` and the few numbers that describe its vocabulary.

use phalanx_proto::TokenId;

/// Tokens of the vocabulary, special ones included: the rows of the embedding.
pub const VOCAB_SIZE: u32 = 201_088;
/// The first special id; every id below stands for text.
pub const FIRST_SPECIAL: TokenId = TokenId(199_998);

/// No token stands for more bytes of text.
pub const TOKEN_BYTES_MAX: usize = 128;

/// `<|endoftext|>`: padding, and an end of generation.
pub const END_OF_TEXT: TokenId = TokenId(199_999);
/// `<|return|>`: the model's turn is over. Sampled only, never part of a history.
pub const RETURN: TokenId = TokenId(200_002);
/// `<|constrain|>`: stands before a content type.
pub const CONSTRAIN: TokenId = TokenId(200_003);
/// `<|channel|>`: stands before the channel's name.
pub const CHANNEL: TokenId = TokenId(200_005);
/// `<|start|>`: begins a message's header.
pub const START: TokenId = TokenId(200_006);
/// `<|end|>`: ends a message, not the turn.
pub const END: TokenId = TokenId(200_007);
/// `<|message|>`: ends the header, begins the content.
pub const MESSAGE: TokenId = TokenId(200_008);
/// `<|call|>`: ends a message to a tool, and the turn.
pub const CALL: TokenId = TokenId(200_012);

/// Where generation stops. [`END`] is not among them: stopping there cuts the answer off after the thinking.
pub const STOP: [TokenId; 3] = [RETURN, CALL, END_OF_TEXT];
