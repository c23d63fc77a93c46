//! API keys.

use phalanx_coordinator::api::ApiKeys;
use serde_json::json;

use crate::support::{Reply, Server, config, start, writing};

async fn server() -> Server {
    let mut config = config();
    config.api_keys = ApiKeys::new(["sk-first", "sk-second"]);
    let plays = writing("<|channel|>final<|message|>7<|return|>");
    start(config, move |_| Ok(plays.clone())).await
}

async fn get(server: &Server, path: &str, headers: &str) -> Reply {
    server.send(format!("GET {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n{headers}\r\n").as_bytes()).await
}

#[tokio::test]
async fn each_key_opens_every_path() {
    let server = server().await;
    for key in ["Bearer sk-first", "Bearer sk-second", "bearer sk-second"] {
        for path in ["/v1/models", "/metrics"] {
            assert_eq!(get(&server, path, &format!("authorization: {key}\r\n")).await.status, 200, "{key} {path}");
        }
    }
}

#[tokio::test]
async fn nothing_else_opens_any() {
    let server = server().await;
    for headers in [
        "",
        "authorization: Bearer wrong\r\n",
        "authorization: Bearer sk-firs\r\n",
        "authorization: Bearer sk-first1\r\n",
        "authorization: Bearer \r\n",
        "authorization: Bearer\r\n",
        "authorization: sk-first\r\n",
        "authorization: Basic c2stZmlyc3Q6\r\n",
        "authorization: Bearer wrong\r\nauthorization: Bearer sk-first\r\n",
        "authorization: Bearer sk-first\r\nauthorization: Bearer sk-first\r\n",
        "api-key: sk-first\r\n",
    ] {
        for path in ["/v1/models", "/v1/models/x", "/metrics", "/nowhere", "//v1/models", "/v1/../health", "/healthx"] {
            let reply = get(&server, path, headers).await;
            assert_eq!((reply.status, &reply.error()["code"]), (401, &json!("invalid_api_key")), "{headers} {path}");
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        }
    }
    assert_eq!(server.ask(json!({})).await.status, 401);
    assert_eq!(server.post(&vec![b'x'; 5 << 20]).await.status, 401);
}

#[tokio::test]
async fn probes_need_no_key() {
    let server = server().await;
    for path in ["/health", "/livez", "/readyz"] {
        assert_eq!(get(&server, path, "").await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn tenants_are_told_apart_by_key() {
    let mut server = server().await;
    let mut tenants = Vec::new();
    for key in ["sk-first", "sk-second", "sk-first"] {
        let body = crate::support::question(json!({})).to_string();
        let request = String::from_utf8(crate::support::post_bytes(body.as_bytes())).unwrap();
        let request = request.replacen("\r\n", &format!("\r\nauthorization: Bearer {key}\r\n"), 1);
        assert_eq!(server.send(request.as_bytes()).await.status, 200);
        tenants.push(server.seen.recv().await.unwrap().tenant);
    }
    assert_eq!(tenants[0], tenants[2]);
    assert_ne!(tenants[0], tenants[1]);
    assert!(!tenants[0].contains("first"), "a tenant's name must not show the key");
}
