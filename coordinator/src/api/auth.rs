//! Who may ask.

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::App;
use super::error::ApiError;

/// Paths that need no key: a prober has none.
const PUBLIC: [&str; 3] = ["/health", "/livez", "/readyz"];

/// The keys that are accepted, as SHA-256. None at all means that everybody may ask.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

/// On whose behalf a request comes.
#[derive(Clone, Debug)]
pub(super) struct Tenant(pub(super) String);

impl ApiKeys {
    /// Accepts these keys.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Self {
        Self(keys.into_iter().map(|key| Sha256::digest(key.as_ref()).into()).collect())
    }

    /// Whose key this is. The time taken depends neither on how much of the key is right nor on which key it is.
    fn tenant(&self, key: &[u8]) -> Option<Tenant> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&hash));
        bool::from(found).then(|| Tenant(hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()))
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

/// Lets a request pass with its [`Tenant`], or answers 401 whatever the path.
pub(super) async fn require_key(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let keys = &app.config().api_keys;
    let tenant = if keys.0.is_empty() || PUBLIC.contains(&request.uri().path()) {
        Some(Tenant("default".to_owned()))
    } else {
        bearer(request.headers()).and_then(|key| keys.tenant(key))
    };
    let Some(tenant) = tenant else { return ApiError::unauthorized().into_response() };
    request.extensions_mut().insert(tenant);
    next.run(request).await
}

/// The key of the one `authorization` header.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, key) = value.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}
