//! The cluster token: a secret that coordinator and workers share. Beyond loopback there must be one.

use std::fmt;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use subtle::ConstantTimeEq;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// A secret that coordinator and workers share. Never printed; compared in constant time.
#[derive(Clone)]
pub struct ClusterToken(Arc<str>);

/// Why a text is no cluster token, or why one is needed. Never holds the text.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Too easily guessed, or absurdly long.
    #[error(
        "a cluster token has from {} to {} characters, this one has {len}; make one with `openssl rand -hex 32`",
        ClusterToken::LEN_MIN,
        ClusterToken::LEN_MAX
    )]
    Length {
        /// Its length.
        len: usize,
    },
    /// It would not survive as a header.
    #[error("a cluster token consists of printable ASCII characters without spaces")]
    Character,
    /// Its file cannot be read.
    #[error("cannot read the cluster token from {}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        why: std::io::Error,
    },
    /// An address that others can reach, and no token.
    #[error(
        "{address} can be reached from other machines, which needs a cluster token: set --cluster-token-file \
        or PHALANX_CLUSTER_TOKEN to the same secret on coordinator and workers, or listen on 127.0.0.1"
    )]
    Needed {
        /// The address.
        address: SocketAddr,
    },
}

impl ClusterToken {
    /// Fewest characters.
    pub const LEN_MIN: usize = 16;
    /// Most characters.
    pub const LEN_MAX: usize = 512;

    /// A token from its text; white space around it is dropped.
    ///
    /// # Errors
    /// A text too short, too long, or with other characters than printable ASCII.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if !(Self::LEN_MIN..=Self::LEN_MAX).contains(&text.len()) {
            return Err(TokenError::Length { len: text.len() });
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::Character);
        }
        Ok(Self(text.into()))
    }

    /// A token from a file that holds nothing else.
    ///
    /// # Errors
    /// A file that cannot be read, or holds no token.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        let mut text = String::new();
        // White space around the token may be as long as the longest token itself.
        let limit = 2 * Self::LEN_MAX as u64;
        let read = std::fs::File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text));
        read.map_err(|why| TokenError::File { path: path.to_owned(), why })?;
        Self::parse(&text)
    }

    /// The token's bytes, for the handshake of the data connections.
    #[must_use]
    pub fn bytes(&self) -> Arc<[u8]> {
        Arc::from(self.0.as_bytes())
    }

    /// The secret itself, to hand it to a process that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    fn header(&self) -> MetadataValue<Ascii> {
        let text = format!("Bearer {}", self.0);
        let mut value = MetadataValue::try_from(text).expect("`parse` lets only printable ASCII through");
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for ClusterToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterToken(..)")
    }
}

/// Whether one may listen on `address`: on loopback always, elsewhere with a token.
///
/// # Errors
/// An address that others can reach, and no token.
pub fn check_listener(address: SocketAddr, token: Option<&ClusterToken>) -> Result<(), TokenError> {
    if token.is_some() || address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    Err(TokenError::Needed { address })
}

/// Puts the token on every call.
#[derive(Clone, Debug)]
pub struct SendToken(Option<MetadataValue<Ascii>>);

impl SendToken {
    /// Sends `token`, if there is one.
    #[must_use]
    pub fn new(token: Option<&ClusterToken>) -> Self {
        Self(token.map(ClusterToken::header))
    }
}

impl Interceptor for SendToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(header) = &self.0 {
            request.metadata_mut().insert("authorization", header.clone());
        }
        Ok(request)
    }
}

/// Refuses every call that does not bear the token.
#[derive(Clone, Debug)]
pub struct CheckToken(Option<ClusterToken>);

impl CheckToken {
    /// Asks for `token`, if there is one.
    #[must_use]
    pub const fn new(token: Option<ClusterToken>) -> Self {
        Self(token)
    }
}

impl Interceptor for CheckToken {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(token) = &self.0 else { return Ok(request) };
        let given = request.metadata().get("authorization").map_or(&b""[..], |value| value.as_encoded_bytes());
        if token.header().as_encoded_bytes().ct_eq(given).into() {
            return Ok(request);
        }
        Err(Status::unauthenticated(
            "this worker asks for the cluster token: give coordinator and workers the same one",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_printable_and_not_short() {
        assert!(matches!(ClusterToken::parse(" 0123456789abcde\n"), Err(TokenError::Length { len: 15 })));
        assert!(matches!(ClusterToken::parse(&"x".repeat(513)), Err(TokenError::Length { len: 513 })));
        assert!(matches!(ClusterToken::parse("0123456789 abcdef"), Err(TokenError::Character)));
        assert!(matches!(ClusterToken::parse("0123456789abcdéf"), Err(TokenError::Character)));
        assert_eq!(&*ClusterToken::parse("0123456789abcdef\n").unwrap().bytes(), b"0123456789abcdef");
    }

    #[test]
    fn a_token_is_never_shown() {
        let token = ClusterToken::parse("correct-horse-battery").unwrap();
        let shown = format!("{token:?} {:?} {:?}", SendToken::new(Some(&token)), CheckToken::new(Some(token.clone())));
        assert!(!shown.contains("horse"), "{shown}");
    }

    #[test]
    fn a_file_holds_a_token_and_nothing_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        assert_eq!(&*ClusterToken::from_file(file.path()).unwrap().bytes(), b"0123456789abcdef");
        std::fs::write(file.path(), vec![b'x'; 1 << 20]).unwrap();
        assert!(matches!(ClusterToken::from_file(file.path()), Err(TokenError::Length { .. })));
        let missing = ClusterToken::from_file(Path::new("/nonexistent/token")).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/token"), "{missing}");
    }

    #[test]
    fn only_loopback_goes_without() {
        let token = ClusterToken::parse("0123456789abcdef").unwrap();
        for address in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            assert!(check_listener(address.parse().unwrap(), None).is_ok(), "{address}");
        }
        for address in ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "[fe80::1]:0"] {
            let refused = check_listener(address.parse().unwrap(), None).unwrap_err();
            assert!(refused.to_string().contains("PHALANX_CLUSTER_TOKEN"), "{refused}");
            assert!(check_listener(address.parse().unwrap(), Some(&token)).is_ok(), "{address}");
        }
    }

    #[test]
    fn a_call_must_bear_the_very_token() {
        let token = ClusterToken::parse("0123456789abcdef").unwrap();
        let other = ClusterToken::parse("0123456789abcdeF").unwrap();
        let mut check = CheckToken::new(Some(token.clone()));
        let mut bears = |token: Option<&ClusterToken>| {
            let request = SendToken::new(token).call(Request::new(())).unwrap();
            check.call(request).is_ok()
        };
        assert!(bears(Some(&token)));
        assert!(!bears(Some(&other)));
        assert!(!bears(None));
    }
}
