//! One request to one endpoint: whether it was sent, and whether and how it was answered. Knows HTTP and its time limits.
//! Does not know what a request or an answer means, except that it distinguishes a refusal from an answer.

use std::io::{self, Read};
use std::time::Duration;

use ureq::http::Response;
use ureq::tls::TlsConfig;
use ureq::unversioned::transport::DefaultConnector;
use ureq::{Agent, Body, SendBody, Timeout};

use super::Endpoint;
use super::codec;
use super::error::{Failure, lower, one_line};
use super::resolver::HostResolver;
use crate::addr::Reason;

/// The largest answer, and the largest message of a watch, in bytes.
pub(super) const REPLY_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// How many idle connections to one endpoint are kept, at the most.
const IDLE_MAX: usize = 8;

/// What it takes to make agents. Each has its own connections.
#[derive(Debug)]
pub(super) struct Agents {
    pub(super) tls: TlsConfig,
    pub(super) resolver: HostResolver,
    /// The longest that one attempt at one endpoint may take, from connecting to the last byte of the answer; of a watch,
    /// each of connecting and waiting for its first answer.
    pub(super) timeout: Duration,
}

impl Agents {
    /// For requests, each of which has to be answered in [`Agents::timeout`].
    pub(super) fn for_requests(&self) -> Agent {
        let limits = Agent::config_builder().timeout_global(Some(self.timeout));
        let limits = limits.max_idle_connections_per_host(IDLE_MAX).max_idle_connections(IDLE_MAX * 8);
        self.agent(limits)
    }

    /// For watches, whose answers never end.
    pub(super) fn for_watches(&self) -> Agent {
        let timeout = Some(self.timeout);
        let limits = Agent::config_builder().timeout_resolve(timeout).timeout_connect(timeout);
        let limits = limits.timeout_send_request(timeout).timeout_send_body(timeout);
        self.agent(limits.timeout_recv_response(timeout).max_idle_connections(0))
    }

    fn agent(&self, limits: ureq::config::ConfigBuilder<ureq::typestate::AgentScope>) -> Agent {
        let config = limits
            .tls_config(self.tls.clone())
            // A status is read together with what etcd says about it.
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            // Otherwise the environment may send requests, with the password, to a proxy.
            .proxy(None)
            .no_delay(true)
            .build();
        Agent::with_parts(config, DefaultConnector::new(), self.resolver.clone())
    }
}

/// A request to one endpoint.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) path: &'a str,
    pub(super) body: &'a str,
    pub(super) token: Option<&'a str>,
    /// What a member without a leader does with it.
    pub(super) leaderless: Leaderless,
    /// How long the agent waits for an answer; for error messages.
    pub(super) timeout: Duration,
}

/// What a member without a leader does with a request. (There is no leader, or the member cannot reach it.)
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaderless {
    /// It waits for one: an election is mostly over within a second.
    Waits,
    /// It ends the answer. Otherwise a watch would be silent until there is a leader.
    GivesUp,
}

/// Sends a request and returns what comes behind `200 OK`.
pub(super) fn call(agent: &Agent, request: Request<'_>) -> Result<Vec<u8>, Failure> {
    read_all(&mut open(agent, request)?, request.timeout)
}

/// Sends a request and returns the answer, of which only the head has been read, and that is `200 OK`.
pub(super) fn open(agent: &Agent, request: Request<'_>) -> Result<Response<Body>, Failure> {
    let mut response = match post(agent, request) {
        // etcd has closed a connection that had waited for this request, just before it came: a new one will do.
        Err(Failure::NoAnswer { was_closed: true, .. }) => post(agent, request),
        other => other,
    }?;
    match response.status().as_u16() {
        200 => Ok(response),
        status => Err(refusal(status, &read_all(&mut response, request.timeout)?)),
    }
}

fn post(agent: &Agent, request: Request<'_>) -> Result<Response<Body>, Failure> {
    let Request { endpoint, path, body, token, leaderless, timeout } = request;
    let mut post = agent.post(format!("{endpoint}{path}"));
    post = post.header("Content-Type", "application/json").header("Content-Length", body.len());
    if let Some(token) = token {
        post = post.header("Authorization", token);
    }
    if leaderless == Leaderless::GivesUp {
        // The gateway makes gRPC's metadata of it, which etcd's own client calls WithRequireLeader.
        post = post.header("Grpc-Metadata-hasleader", "true");
    }
    let mut sent = Sent { rest: body.as_bytes(), has_begun: false };
    let answer = post.send(SendBody::from_reader(&mut sent));
    answer.map_err(|e| match sent.has_begun {
        true => Failure::NoAnswer { why: describe_error(&e, timeout), was_closed: is_closed(&e) },
        false => Failure::NotSent(describe_error(&e, timeout)),
    })
}

/// The body of a request. Records whether ureq has read any of it; until then, etcd cannot have done anything.
struct Sent<'a> {
    rest: &'a [u8],
    has_begun: bool,
}

impl Read for Sent<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.has_begun = true;
        self.rest.read(buffer)
    }
}

/// Reads an answer, which is JSON: one that does not begin like it is not read any further.
fn read_all(response: &mut Response<Body>, timeout: Duration) -> Result<Vec<u8>, Failure> {
    let mut reader = response.body_mut().with_config().limit(REPLY_BYTES_MAX).reader();
    let mut body = Vec::new();
    reader.by_ref().take(1).read_to_end(&mut body).map_err(|e| body_failure(e, timeout))?;
    if body.first().is_some_and(|&first| first != b'{' && !first.is_ascii_whitespace()) {
        return Err(match response.status().as_u16() {
            status if status >= 500 => Failure::no_answer(format!("HTTP status {status}")),
            200 => Failure::BadReply("bad answer: it is no JSON".into()),
            status => Failure::BadReply(format!("HTTP status {status}")),
        });
    }
    reader.read_to_end(&mut body).map_err(|e| body_failure(e, timeout))?;
    Ok(body)
}

fn body_failure(error: io::Error, timeout: Duration) -> Failure {
    match ureq::Error::from(error) {
        ureq::Error::BodyExceedsLimit(_) => too_long(),
        e => Failure::no_answer(describe_error(&e, timeout)),
    }
}

pub(super) fn too_long() -> Failure {
    Failure::BadReply(format!("the answer is longer than {REPLY_BYTES_MAX} bytes"))
}

/// What another status than 200 means.
fn refusal(status: u16, body: &[u8]) -> Failure {
    match codec::read_refusal(body) {
        Some((code, message)) => Failure::from_etcd(code, &message),
        None if status >= 500 => Failure::no_answer(format!("HTTP status {status}")),
        None => Failure::BadReply(format!("HTTP status {status}")),
    }
}

/// Returns `true` for the error of a connection that the other side had closed before the request arrived.
fn is_closed(error: &ureq::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let ureq::Error::Io(error) = error else { return false };
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// Describes an error for users. ureq's own messages name its internal parts.
fn describe_error(error: &ureq::Error, timeout: Duration) -> String {
    match error {
        ureq::Error::Io(error) => describe_io_error(error),
        ureq::Error::Timeout(Timeout::Resolve) => "its address is not known in time".into(),
        ureq::Error::Timeout(Timeout::Connect) => format!("no connection within {timeout:?}"),
        ureq::Error::Timeout(_) => format!("no answer within {timeout:?}"),
        ureq::Error::HostNotFound => "there is no such host".into(),
        other => one_line(&other.to_string()),
    }
}

pub(super) fn describe_io_error(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the connection was closed".into(),
        _ => lower(&one_line(&Reason(error).to_string())),
    }
}
