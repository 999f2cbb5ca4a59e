//! A supervisor of a test's own, with services that the test defines, and nothing left behind.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use zinit_tracker::{
    StopReport,
    supervisor::{
        Definition, Definitions, Finished, Handle, LogRing, Options, ShutdownReport, State, Status, Supervisor,
        SupervisorError,
    },
};

use crate::{Cleanup, Facts, Marker, Ready, actor_path, sandbox::DEADLINE, sandbox::Sandbox, survivors};

/// How often a condition is looked at that nothing announces.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Definitions in memory.
#[derive(Debug, Default)]
pub struct Services(Mutex<BTreeMap<String, Definition>>);

impl Services {
    fn get(&self, service: &str) -> Result<Definition, SupervisorError> {
        let services = self.0.lock().expect("no test panics here");
        let found = services.get(service).cloned();
        found.ok_or_else(|| SupervisorError::ServiceNotFound {
            service: service.to_owned(),
        })
    }
}

impl Definitions for Services {
    fn load(&self, service: &str) -> Result<Definition, SupervisorError> {
        self.get(service)
    }

    fn load_all(&self) -> Vec<(String, Result<Definition, SupervisorError>)> {
        let services = self.0.lock().expect("no test panics here");
        services
            .iter()
            .map(|(name, it)| (name.clone(), Ok(it.clone())))
            .collect()
    }

    fn create(&self, service: &str, file: &serde_json::Value) -> Result<(), SupervisorError> {
        let command = file["exec"].as_str().unwrap_or_default();
        let mut services = self.0.lock().expect("no test panics here");
        services.insert(service.to_owned(), Definition::new(["sh", "-c", command]));
        Ok(())
    }

    fn delete(&self, service: &str) -> Result<(), SupervisorError> {
        self.get(service)?;
        self.0.lock().expect("no test panics here").remove(service);
        Ok(())
    }

    fn get(&self, service: &str) -> Result<serde_json::Value, SupervisorError> {
        let definition = self.get(service)?;
        Ok(serde_json::json!({ "exec": definition.exec.join(" ") }))
    }
}

/// A supervisor with pins of its own; every process of its services carries one marker.
#[derive(Debug)]
pub struct Supervised {
    _cleanup: Cleanup,
    /// The tracker, seen through another client.
    pub sandbox: Sandbox,
    /// What the supervisor is talked to through.
    pub handle: Handle,
    /// Where services print.
    pub logs: Arc<LogRing>,
    /// What every process of the services carries.
    pub marker: Marker,
    services: Arc<Services>,
    supervisor: Supervisor,
}

impl Supervised {
    /// A supervisor without services.
    pub async fn new() -> Self {
        Self::start(Sandbox::new(), Marker::new(), Services::default(), false).await
    }

    /// A supervisor that reaps the orphans of this process.
    pub async fn reaping() -> Self {
        Self::start(Sandbox::new(), Marker::new(), Services::default(), true).await
    }

    /// A supervisor that finds one service defined, and what an earlier one has left.
    pub async fn following<T>(
        name: &str,
        definition: Definition,
        leave: impl FnOnce(&Sandbox, &Marker) -> T,
    ) -> (Self, T) {
        let (sandbox, marker) = (Sandbox::new(), Marker::new());
        let left = leave(&sandbox, &marker);
        let services = Services(Mutex::new(BTreeMap::from([(name.to_owned(), definition)])));
        (Self::start(sandbox, marker, services, false).await, left)
    }

    async fn start(sandbox: Sandbox, marker: Marker, services: Services, reap_orphans: bool) -> Self {
        let cleanup = Cleanup::new(&marker);
        let services = Arc::new(services);
        let logs = Arc::new(LogRing::new(10_000));
        let options = Options {
            definitions: Arc::clone(&services) as Arc<dyn Definitions>,
            logs: Arc::clone(&logs),
            environment: BTreeMap::from([(Marker::ENV.to_owned(), marker.to_string())]),
            reap_orphans,
            state: None,
        };
        let supervisor = Supervisor::start(sandbox.second_client(), options)
            .await
            .expect("the books can be read");
        Self {
            _cleanup: cleanup,
            handle: supervisor.handle(),
            sandbox,
            logs,
            marker,
            services,
            supervisor,
        }
    }

    /// Defines a service that is not supervised for that.
    pub fn define(&self, name: &str, definition: Definition) {
        let mut services = self.services.0.lock().expect("no test panics here");
        services.insert(name.to_owned(), definition);
    }

    /// Defines a service and has it supervised.
    pub async fn monitor(&self, name: &str, definition: Definition) {
        self.define(name, definition);
        self.handle.monitor(name).await.expect("it is new");
    }

    /// Has an actor play the service, and returns when its processes are all there.
    pub async fn play(
        &self,
        name: &str,
        behaviour: &str,
        args: &[&str],
        change: impl FnOnce(&mut Definition),
    ) -> Facts {
        let mut ready = Ready::new().expect("a FIFO can be made");
        let mut definition = self.actor(behaviour, args);
        let fifo = ready
            .path()
            .to_str()
            .expect("temporary directories are UTF-8")
            .to_owned();
        definition.env.insert(Ready::ENV.to_owned(), fifo);
        change(&mut definition);
        self.monitor(name, definition).await;
        let facts = tokio::task::spawn_blocking(move || ready.wait()).await;
        facts.expect("waiting does not panic").expect("the actor gets ready")
    }

    /// A service that an actor plays; the argument `MARKER` stands for the marker.
    #[must_use]
    pub fn actor(&self, behaviour: &str, args: &[&str]) -> Definition {
        let path: PathBuf = actor_path().expect("the actor binary is built along with the tests");
        let path = path.to_str().expect("the target directory is UTF-8").to_owned();
        let args = args.iter().map(|arg| match *arg {
            "MARKER" => self.marker.to_string(),
            arg => arg.to_owned(),
        });
        Definition {
            shutdown_timeout: DEADLINE,
            kill_after: DEADLINE,
            ..Definition::new([path, behaviour.to_owned()].into_iter().chain(args))
        }
    }

    /// What the service is.
    pub async fn status(&self, name: &str) -> Status {
        self.handle.status(name).await.expect("it is supervised")
    }

    /// Waits until the service is as it should be.
    ///
    /// # Panics
    ///
    /// If it is not by the deadline.
    pub async fn until(&self, name: &str, wanted: impl Fn(&Status) -> bool) -> Status {
        let waiting = async {
            loop {
                let status = self.status(name).await;
                if wanted(&status) {
                    return status;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        match tokio::time::timeout(DEADLINE, waiting).await {
            Ok(status) => status,
            Err(_) => panic!("{:#?} is not as it should be", self.status(name).await),
        }
    }

    /// Waits until the service is in this state.
    pub async fn until_state(&self, name: &str, state: State) -> Status {
        self.until(name, |status| status.state == state).await
    }

    /// Stops the service, and asserts that it is proven and nothing is left.
    pub async fn stop(&self, name: &str) -> StopReport {
        let report = tokio::time::timeout(DEADLINE, self.handle.stop(name))
            .await
            .expect("the stop ends")
            .expect("nobody survives");
        assert!(report.proven, "{report:#?}");
        let status = self.status(name).await;
        assert_eq!(status.pid, 0, "{status:#?}");
        report
    }

    /// Asserts that no process of any service is left.
    pub fn assert_nothing_left(&self) {
        assert_eq!(survivors(&self.marker), []);
    }

    /// The lines that services printed.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.logs.snapshot(None).iter().map(ToString::to_string).collect()
    }

    /// Shuts down, and asserts that nothing is left: no process, no service in the books, no pins.
    pub async fn close(self) -> ShutdownReport {
        self.close_within(DEADLINE).await
    }

    /// As [`Supervised::close`], for many services.
    pub async fn close_within(self, deadline: Duration) -> ShutdownReport {
        let report = self.shut_down(deadline).await;
        assert_eq!(self.sandbox.tracker.services().expect("they can be read"), []);
        self.finish().await;
        report
    }

    /// Shuts down, and asserts that no process is left.
    pub async fn shut_down(&self, deadline: Duration) -> ShutdownReport {
        let report = tokio::time::timeout(deadline, self.handle.shutdown())
            .await
            .expect("the shutdown ends")
            .expect("nobody has ended it before");
        assert!(report.survivors.is_empty(), "{report:#?}");
        self.assert_nothing_left();
        report
    }

    /// Ends what was shut down, and asserts that the pins are gone.
    pub async fn finish(self) {
        let (finished, _) = tokio::time::timeout(DEADLINE, self.supervisor.finished())
            .await
            .expect("the supervisor ends");
        assert_eq!(finished, Finished::PowerOff);
        assert!(matches!(
            self.handle.list().await,
            Err(SupervisorError::ShuttingDown { .. })
        ));
        self.sandbox.close();
    }
}
