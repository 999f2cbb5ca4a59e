//! What a service holds, and whether it is free again.

use std::fs::{File, TryLockError};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// Whether TCP port `port` of 127.0.0.1 can be bound right now, without `SO_REUSEADDR`.
///
/// # Errors
/// Fails if a socket cannot be created, or not be bound for another reason than that the port is taken.
pub fn port_is_free(port: u16) -> io::Result<bool> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    match bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)) {
        Ok(()) => Ok(true),
        Err(Errno::ADDRINUSE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether somebody listens on TCP port `port` of 127.0.0.1, in the network namespace of the caller. A socket that is only bound,
/// such as one of [`port_is_free`] that a process of another thread has inherited for a moment, does not count.
///
/// # Errors
/// Fails if the kernel's table cannot be read.
pub fn is_listened_on(port: u16) -> io::Result<bool> {
    const LISTEN: &str = "0A";
    let table = std::fs::read_to_string("/proc/net/tcp")?;
    let address = format!("{:08X}:{port:04X}", u32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets()));
    Ok(table.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(1) == Some(&address.as_str()) && fields.get(3) == Some(&LISTEN)
    }))
}

/// Whether an exclusive flock on `path` can be had right now, through a file description of its own.
///
/// # Errors
/// Fails if the file cannot be opened, or not be locked for another reason than that it is locked.
pub fn lock_is_free(path: &Path) -> io::Result<bool> {
    match File::open(path)?.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The name of a cgroup for one test; the actor creates it, this value removes it.
#[derive(Debug)]
pub struct TestCgroup(PathBuf);

impl TestCgroup {
    /// Names a cgroup that does not exist yet in the version 2 hierarchy, or nothing where that is not mounted or read-only.
    ///
    /// # Errors
    /// Fails if the list of mounts cannot be read.
    pub fn new(name: &str) -> io::Result<Option<Self>> {
        let mounts = std::fs::read_to_string("/proc/self/mounts")?;
        let root = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2" && options.split(',').any(|option| option == "rw")).then_some(path)
        });
        Ok(root.map(|root| Self::at(Path::new(root).join(name))))
    }

    /// A cgroup that does not exist yet at this path.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where the cgroup is, or will be.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        // Processes leave their cgroup a moment after they end, so the directory can be busy for as long as that takes.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match std::fs::remove_dir(&self.0) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => {
                    eprintln!("failed to remove {}: {error}", self.0.display());
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_is_taken_while_a_socket_listens() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!port_is_free(port).unwrap());
        drop(listener);
        assert!(port_is_free(port).unwrap());
    }

    #[test]
    fn a_lock_is_taken_while_a_file_holds_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let holder = File::open(file.path()).unwrap();
        holder.lock().unwrap();
        assert!(!lock_is_free(file.path()).unwrap());
        drop(holder);
        assert!(lock_is_free(file.path()).unwrap());
    }
}
