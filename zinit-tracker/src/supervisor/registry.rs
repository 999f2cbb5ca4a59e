//! The task that knows every service: passes requests on, and tells services about their dependencies.
//!
//! It never waits for a service, a file or the kernel; whatever may take time comes back as an event.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, OnceLock},
};

use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::{Id, JoinError, JoinSet},
};

use super::{
    SupervisorError,
    command::Context,
    definition::{Definition, Definitions},
    graph::Graph,
    handle::{Finished, Reloaded, Reply, Request, ShutdownReport, Status},
    machine::Dependencies,
    resume::{self, Found},
    service::{Announcement, Beginning, Message, News, Task, UNKNOWN, answer, chain},
    shutdown::{self, shutdown},
    state::{State, Target},
};

/// What was found of every service.
pub(super) type Loaded = Vec<(String, Result<Definition, SupervisorError>)>;

/// Shared so that they outlive a registry that panics; held by the one that runs.
pub(super) type Requests = Arc<Mutex<mpsc::Receiver<Request>>>;

/// What the end is to be, once somebody has asked for it.
pub(super) type Asked = Arc<OnceLock<Finished>>;

/// What comes back from elsewhere.
#[derive(Debug)]
enum Event {
    Loaded(String, Box<Result<Definition, SupervisorError>>, Reply<()>),
    Reloaded(Loaded, Reply<Reloaded>),
    Down(ShutdownReport),
}

/// A supervised service as the registry knows it.
#[derive(Debug)]
struct Entry {
    mailbox: mpsc::UnboundedSender<Message>,
    definition: Arc<Definition>,
    /// What the service said last, of what was heard.
    last: Announcement,
    /// What it says now: whoever was answered by the service must not be told what was before, and while others speak, what is said
    /// is heard late.
    says: watch::Receiver<Announcement>,
    told: Dependencies,
}

/// The end, once it was asked for.
#[derive(Debug)]
struct Closing {
    finished: Finished,
    replies: Vec<Reply<ShutdownReport>>,
}

pub(super) struct Registry {
    context: Arc<Context>,
    definitions: Arc<dyn Definitions>,
    entries: BTreeMap<String, Entry>,
    dependants: HashMap<String, BTreeSet<String>>,
    cycles: BTreeMap<String, String>,
    /// Services of which an earlier supervisor left processes.
    occupied: BTreeSet<String>,
    tasks: JoinSet<()>,
    names: HashMap<Id, String>,
    requests: Requests,
    news: mpsc::UnboundedReceiver<News>,
    news_sender: mpsc::UnboundedSender<News>,
    events: mpsc::UnboundedReceiver<Event>,
    event_sender: mpsc::UnboundedSender<Event>,
    closing: Option<Closing>,
    /// What the end is to be, once it was asked for; outlives a registry that panics.
    asked: Asked,
}

/// Tells that something cannot be received any more, which happens when the supervisor ends.
fn post<T>(sender: &mpsc::UnboundedSender<T>, message: T) {
    if sender.send(message).is_err() {
        tracing::debug!("nobody receives the message: the supervisor ends");
    }
}

impl Registry {
    pub(super) fn new(
        context: Arc<Context>,
        definitions: Arc<dyn Definitions>,
        requests: Requests,
        asked: Asked,
    ) -> Self {
        let (news_sender, news) = mpsc::unbounded_channel();
        let (event_sender, events) = mpsc::unbounded_channel();
        Self {
            context,
            definitions,
            entries: BTreeMap::new(),
            dependants: HashMap::new(),
            cycles: BTreeMap::new(),
            occupied: BTreeSet::new(),
            tasks: JoinSet::new(),
            names: HashMap::new(),
            requests,
            news,
            news_sender,
            events,
            event_sender,
            closing: None,
            asked,
        }
    }

    /// Supervises the services, and serves requests until the end that one of them asks for.
    pub(super) async fn run(mut self, found: Found) -> (Finished, ShutdownReport) {
        let requests = Arc::clone(&self.requests);
        let mut requests = requests.lock().await;
        self.begin(found);
        if let Some(finished) = self.asked.get().copied() {
            tracing::warn!("the end had begun: it goes on");
            self.close(finished, Vec::new());
        }
        for service in &self.occupied {
            tracing::warn!(
                service,
                "an earlier supervisor left it running, and it is not defined any more: it is stopped at the shutdown"
            );
        }
        let end = loop {
            tokio::select! {
                // Requests are about what the services have said.
                biased;
                Some(news) = self.news.recv() => self.news(news),
                Some(event) = self.events.recv() => if let Some(end) = self.event(event) {
                    break end;
                },
                Some(ended) = self.tasks.join_next_with_id() => self.task_ended(ended),
                Some(request) = requests.recv() => self.request(request),
            }
        };
        requests.close();
        // Nothing that they could still do matters now.
        self.tasks.shutdown().await;
        end
    }

    /// Takes up what an earlier supervisor left, and starts the rest.
    fn begin(&mut self, found: Found) {
        self.occupied = found.occupied;
        for (name, resumed) in found.resumed {
            let definition = resumed.definition.clone();
            self.supervise(name, definition, Beginning::Resumed(Box::new(resumed)));
        }
        let reloaded = self.take_over(found.services);
        for service in reloaded.changed {
            tracing::warn!(
                service,
                "its definition has changed since it was started: the change holds from its next start on"
            );
        }
        for service in reloaded.missing {
            tracing::warn!(service, "has no definition any more: it goes on as it was");
        }
        if let Some(state) = &self.context.state {
            state.complete();
        }
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::List(reply) => answer(reply, Ok(self.list())),
            Request::Status(name, reply) => answer(reply, self.status(name)),
            Request::Start(name, reply) => self.pass_on(name, reply, true, Message::Start),
            Request::Stop(name, reply) => self.pass_on(name, reply, false, Message::Stop),
            Request::Restart(name, reply) => self.pass_on(name, reply, true, Message::Restart),
            Request::Kill(name, signal, reply) => {
                self.pass_on(name, reply, false, |reply| Message::Kill(signal, reply));
            }
            Request::Stats(name, reply) => self.pass_on(name, reply, false, Message::Stats),
            Request::Forget(name, reply) => self.pass_on(name, reply, false, Message::Forget),
            Request::Monitor(name, reply) => self.load(name, reply),
            Request::Create(name, file, reply) => self.with_files(reply, move |files| files.create(&name, &file)),
            Request::Delete(name, reply) => self.with_files(reply, move |files| files.delete(&name)),
            Request::Get(name, reply) => self.with_files(reply, move |files| files.get(&name)),
            Request::Reload(reply) => self.load_all(reply),
            Request::Finish(finished, reply) => self.finish(finished, reply),
        }
    }

    fn list(&self) -> BTreeMap<String, State> {
        let states = self.entries.iter();
        states
            .map(|(name, entry)| (name.clone(), entry.says.borrow().state.clone()))
            .collect()
    }

    fn status(&self, name: String) -> Result<Status, SupervisorError> {
        let Some(entry) = self.entries.get(&name) else {
            return Err(SupervisorError::ServiceNotFound { service: name });
        };
        let state_of = |name: &String| {
            self.entries
                .get(name)
                .map_or(State::Unknown, |entry| entry.says.borrow().state.clone())
        };
        let said = entry.says.borrow().clone();
        let after = &entry.definition.after;
        Ok(Status {
            name,
            pid: said.pid,
            state: said.state,
            target: said.target,
            after: after.iter().map(|name| (name.clone(), state_of(name))).collect(),
            tracking: self.context.tracker.tracking(),
            fallback_reason: self.context.tracker.fallback_reason().map(str::to_owned),
        })
    }

    /// Lets the service's task answer.
    fn pass_on<T>(&self, service: String, reply: Reply<T>, starts: bool, message: impl FnOnce(Reply<T>) -> Message) {
        if starts && self.closing.is_some() {
            return answer(reply, Err(SupervisorError::ShuttingDown { service: Some(service) }));
        }
        match self.entries.get(&service) {
            Some(entry) => post(&entry.mailbox, message(reply)),
            None => answer(reply, Err(SupervisorError::ServiceNotFound { service })),
        }
    }

    fn with_files<T: Send + 'static>(
        &self,
        reply: Reply<T>,
        operation: impl FnOnce(&dyn Definitions) -> Result<T, SupervisorError> + Send + 'static,
    ) {
        let definitions = Arc::clone(&self.definitions);
        tokio::task::spawn_blocking(move || answer(reply, operation(&*definitions)));
    }

    /// Why the service cannot be taken under supervision.
    fn refuse(&self, service: &str) -> Result<(), SupervisorError> {
        let service = service.to_owned();
        if self.closing.is_some() {
            Err(SupervisorError::ShuttingDown { service: Some(service) })
        } else if self.entries.contains_key(&service) {
            Err(SupervisorError::ServiceAlreadyMonitored { service })
        } else {
            Ok(())
        }
    }

    fn load(&self, name: String, reply: Reply<()>) {
        if let Err(error) = self.refuse(&name) {
            return answer(reply, Err(error));
        }
        let (definitions, events) = (Arc::clone(&self.definitions), self.event_sender.clone());
        tokio::task::spawn_blocking(move || {
            let definition = Box::new(definitions.load(&name));
            post(&events, Event::Loaded(name, definition, reply));
        });
    }

    fn load_all(&self, reply: Reply<Reloaded>) {
        if self.closing.is_some() {
            return answer(reply, Err(SupervisorError::ShuttingDown { service: None }));
        }
        let (definitions, events) = (Arc::clone(&self.definitions), self.event_sender.clone());
        tokio::task::spawn_blocking(move || post(&events, Event::Reloaded(definitions.load_all(), reply)));
    }

    /// Returns the end, when it has come.
    fn event(&mut self, event: Event) -> Option<(Finished, ShutdownReport)> {
        match event {
            Event::Loaded(name, definition, reply) => self.loaded(name, *definition, reply),
            Event::Reloaded(_, reply) if self.closing.is_some() => {
                answer(reply, Err(SupervisorError::ShuttingDown { service: None }));
            }
            Event::Reloaded(services, reply) => answer(reply, Ok(self.take_over(services))),
            Event::Down(report) => {
                let closing = self.closing.take()?;
                for reply in closing.replies {
                    answer(reply, Ok(report.clone()));
                }
                return Some((closing.finished, report));
            }
        }
        None
    }

    fn loaded(&mut self, name: String, definition: Result<Definition, SupervisorError>, reply: Reply<()>) {
        // Much can have happened meanwhile.
        let definition = match self.refuse(&name).and(definition) {
            Ok(definition) => definition,
            Err(error) => return answer(reply, Err(error)),
        };
        let mailbox = self.supervise_new(name, definition);
        self.rethink();
        post(&mailbox, Message::Start(reply));
    }

    /// Supervises and starts what is new, and redefines what has changed.
    fn take_over(&mut self, services: Loaded) -> Reloaded {
        let mut reloaded = Reloaded::default();
        let mut new = Vec::new();
        let known: BTreeSet<_> = services.iter().map(|(name, _)| name.clone()).collect();
        for (name, definition) in services {
            match (definition, self.entries.get_mut(&name)) {
                (Err(error), _) => {
                    let reason = chain(&error);
                    tracing::error!(service = name, reason, "skipped");
                    reloaded.failed.insert(name, reason);
                }
                (Ok(definition), Some(entry)) if *entry.definition != definition => {
                    entry.definition = Arc::new(definition);
                    post(&entry.mailbox, Message::Redefine(Arc::clone(&entry.definition)));
                    reloaded.changed.push(name);
                }
                (Ok(_), Some(_)) => {}
                (Ok(definition), None) => {
                    new.push(self.supervise_new(name.clone(), definition));
                    reloaded.added.push(name);
                }
            }
        }
        let missing = self.entries.keys().filter(|name| !known.contains(*name));
        reloaded.missing = missing.cloned().collect();
        self.rethink();
        if self.asked.get().is_some() {
            return reloaded;
        }
        for mailbox in new {
            let (reply, _) = oneshot::channel();
            post(&mailbox, Message::Start(reply));
        }
        reloaded
    }

    /// Gives a service a task of its own; whoever calls this starts it.
    fn supervise_new(&mut self, name: String, definition: Definition) -> mpsc::UnboundedSender<Message> {
        if let Some(state) = &self.context.state {
            state.save(&name, Some(resume::wanted(&definition)));
        }
        let beginning = if self.occupied.remove(&name) {
            Beginning::Occupied
        } else {
            Beginning::Empty
        };
        self.supervise(name, definition, beginning)
    }

    fn supervise(
        &mut self,
        name: String,
        definition: Definition,
        beginning: Beginning,
    ) -> mpsc::UnboundedSender<Message> {
        let definition = Arc::new(definition);
        let (mailbox, says) = self.employ(&name, &definition, beginning);
        let entry = Entry {
            mailbox: mailbox.clone(),
            definition,
            last: UNKNOWN,
            says,
            told: Dependencies::Unmet,
        };
        self.entries.insert(name, entry);
        mailbox
    }

    fn employ(
        &mut self,
        name: &str,
        definition: &Arc<Definition>,
        beginning: Beginning,
    ) -> (mpsc::UnboundedSender<Message>, watch::Receiver<Announcement>) {
        let (mailbox, messages) = mpsc::unbounded_channel();
        let (announced, says) = watch::channel(UNKNOWN);
        let task = Task::new(
            name.to_owned(),
            Arc::clone(&self.context),
            Arc::clone(definition),
            beginning,
            messages,
            (announced, self.news_sender.clone()),
        );
        let task = self.tasks.spawn(task.run());
        self.names.insert(task.id(), name.to_owned());
        (mailbox, says)
    }

    /// A task ends with its mailbox; one that ends before has panicked, and another goes on from what the books say.
    fn task_ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let (id, error) = match ended {
            Ok((id, ())) => (id, None),
            Err(error) => (error.id(), Some(error)),
        };
        let Some(name) = self.names.remove(&id) else {
            return;
        };
        let (Some(error), Some(entry)) = (error, self.entries.get(&name)) else {
            return;
        };
        tracing::error!(service = name, %error, "the task of the service has failed: a new one takes over");
        let wanted = entry.last.target == Target::Up && self.closing.is_none();
        let definition = Arc::clone(&entry.definition);
        let (mailbox, says) = self.employ(&name, &definition, Beginning::Occupied);
        if self.closing.is_some() {
            post(&mailbox, Message::Close);
        }
        if wanted {
            let (reply, _) = oneshot::channel();
            post(&mailbox, Message::Start(reply));
        }
        if let Some(entry) = self.entries.get_mut(&name) {
            entry.mailbox = mailbox;
            entry.says = says;
            entry.told = Dependencies::Unmet;
        }
        self.news(News::Changed(name.clone(), UNKNOWN));
        self.tell_dependencies(&name);
    }

    fn news(&mut self, news: News) {
        match news {
            News::Changed(name, announcement) => {
                let Some(entry) = self.entries.get_mut(&name) else {
                    return;
                };
                let turned = entry.last.ready != announcement.ready;
                entry.last = announcement;
                if turned {
                    for dependant in self.dependants.get(&name).cloned().unwrap_or_default() {
                        self.tell_dependencies(&dependant);
                    }
                }
            }
            News::Forgotten(name, reply) => {
                self.entries.remove(&name);
                self.rethink();
                tracing::info!(service = name, "forgotten");
                answer(reply, Ok(()));
            }
        }
    }

    /// Works out anew who depends on whom, after services have come, gone or changed.
    fn rethink(&mut self) {
        self.dependants.clear();
        for (name, entry) in &self.entries {
            for dependency in &entry.definition.after {
                let dependants = self.dependants.entry(dependency.clone()).or_default();
                dependants.insert(name.clone());
            }
        }
        let cycles = self.graph().cycles();
        for (name, cycle) in &cycles {
            if self.cycles.get(name) != Some(cycle) {
                tracing::error!(service = name, cycle, "can never start: its dependencies form a cycle");
            }
        }
        self.cycles = cycles;
        let names: Vec<_> = self.entries.keys().cloned().collect();
        for name in names {
            self.tell_dependencies(&name);
        }
    }

    fn graph(&self) -> Graph {
        let services = self.entries.iter();
        let services: Vec<_> = services
            .map(|(name, entry)| (name.as_str(), entry.definition.after.as_slice()))
            .collect();
        Graph::new(services)
    }

    /// Tells a service about its dependencies, if that is news.
    fn tell_dependencies(&mut self, name: &str) {
        let Some(entry) = self.entries.get(name) else {
            return;
        };
        let is_ready = |name: &String| self.entries.get(name).is_some_and(|entry| entry.last.ready);
        let dependencies = match self.cycles.get(name) {
            Some(cycle) => Dependencies::Cycle(cycle.clone()),
            None if entry.definition.after.iter().all(is_ready) => Dependencies::Met,
            None => Dependencies::Unmet,
        };
        if entry.told == dependencies {
            return;
        }
        post(&entry.mailbox, Message::Dependencies(dependencies.clone()));
        if let Some(entry) = self.entries.get_mut(name) {
            entry.told = dependencies;
        }
    }

    /// Begins the end; once begun, it is the same for all who ask.
    fn finish(&mut self, finished: Finished, reply: Reply<ShutdownReport>) {
        if let Some(closing) = &mut self.closing {
            closing.replies.push(reply);
            return;
        }
        let finished = *self.asked.get_or_init(|| finished);
        self.close(finished, vec![reply]);
    }

    fn close(&mut self, finished: Finished, replies: Vec<Reply<ShutdownReport>>) {
        tracing::info!(?finished, services = self.entries.len(), "shutting down");
        self.closing = Some(Closing { finished, replies });
        let mut members = HashMap::new();
        for (name, entry) in &self.entries {
            post(&entry.mailbox, Message::Close);
            let member = shutdown::Member {
                mailbox: entry.mailbox.clone(),
                shutdown_timeout: entry.definition.shutdown_timeout,
            };
            members.insert(name.clone(), member);
        }
        let order = self.graph().stop_order();
        let (context, events) = (Arc::clone(&self.context), self.event_sender.clone());
        tokio::spawn(async move {
            let names: Vec<_> = members.keys().cloned().collect();
            let way_down = tokio::spawn(shutdown(Arc::clone(&context), order, members));
            let report = match way_down.await {
                Ok(report) => report,
                Err(error) => {
                    tracing::error!(%error, "the shutdown has failed: everything is killed");
                    shutdown::at_once(context, names).await
                }
            };
            post(&events, Event::Down(report));
        });
    }
}
