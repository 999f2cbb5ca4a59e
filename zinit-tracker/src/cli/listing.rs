//! The services that a listing is asked for.

use zinit_tracker::{ServiceInfo, Tracker, TrackerError};

use super::{Global, close};

/// Reads the named service, or all of them; without a name, nothing where nothing is pinned.
pub(super) fn listed<T>(
    global: &Global,
    name: Option<&str>,
    read: impl Fn(&Tracker, ServiceInfo) -> Result<T, TrackerError>,
) -> anyhow::Result<Vec<T>> {
    let tracker = match name {
        None => global.existing()?,
        Some(_) => Some(global.existing_or_fail()?),
    };
    let Some(tracker) = tracker else {
        return Ok(Vec::new());
    };
    let listed = list(&tracker, name, read);
    close(tracker);
    Ok(listed?)
}

fn list<T>(
    tracker: &Tracker,
    name: Option<&str>,
    read: impl Fn(&Tracker, ServiceInfo) -> Result<T, TrackerError>,
) -> Result<Vec<T>, TrackerError> {
    let services = match name {
        Some(name) => vec![tracker.find(name)?],
        None => tracker.services()?,
    };
    let mut listed = Vec::new();
    for info in services {
        match read(tracker, info) {
            Ok(service) => listed.push(service),
            // It has ended since it was listed.
            Err(TrackerError::NotRegistered(_)) if name.is_none() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listed)
}
