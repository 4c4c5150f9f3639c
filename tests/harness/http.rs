//! As much HTTP/1.1 as pushing an image and serving one needs: one request per connection, no encoding of bodies.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for a peer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The head of a message and its body.
#[derive(Debug)]
pub struct Message {
    /// The first line, without its end.
    pub start: String,
    headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Message {
    /// Reads one; a body is as long as `content-length` says, else empty.
    ///
    /// # Errors
    /// If the peer fails or speaks something else.
    pub fn read(stream: impl Read) -> io::Result<Message> {
        let mut reader = BufReader::new(stream);
        let mut line = || -> io::Result<String> {
            let mut text = String::new();
            if reader.read_line(&mut text)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(text.trim_end().to_owned())
        };
        let start = line()?;
        let mut headers = Vec::new();
        loop {
            let text = line()?;
            let Some((key, value)) = text.split_once(':') else { break };
            headers.push((key.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut message = Message { start, headers, body: Vec::new() };
        let length = message.header("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
        reader.take(length).read_to_end(&mut message.body)?;
        Ok(message)
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The status of a response; 0 if there is none.
    pub fn status(&self) -> u16 {
        self.start.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0)
    }
}

/// Sends one request and reads the response.
///
/// # Errors
/// If the peer cannot be reached or fails.
pub fn request(
    peer: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Message> {
    let mut stream = TcpStream::connect_timeout(&peer, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (key, value) in headers {
        head += &format!("{key}: {value}\r\n");
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    stream.write_all(body)?;
    Message::read(stream)
}

/// Writes a response whose body may be shorter than the length it announces.
///
/// # Errors
/// If the peer fails.
pub fn respond(
    mut stream: impl Write,
    status: u16,
    headers: &[(&str, String)],
    length: usize,
    body: &[u8],
) -> io::Result<()> {
    let mut head = format!("HTTP/1.1 {status} -\r\nconnection: close\r\ncontent-length: {length}\r\n");
    for (key, value) in headers {
        head += &format!("{key}: {value}\r\n");
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    stream.write_all(body)?;
    stream.flush()
}
