//! Who depends on whom: cycles, and the order of a shutdown. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use petgraph::{
    Direction,
    algo::kosaraju_scc,
    graph::{DiGraph, NodeIndex},
};

/// Services and their dependencies: an edge leads from a service to what it depends on.
#[derive(Debug)]
pub(super) struct Graph(DiGraph<String, ()>);

impl Graph {
    /// Names in `after` that are no services are left out.
    pub(super) fn new<'a>(services: impl IntoIterator<Item = (&'a str, &'a [String])> + Clone) -> Self {
        let mut graph = DiGraph::new();
        let index: HashMap<_, _> = services
            .clone()
            .into_iter()
            .map(|(name, _)| (name, graph.add_node(name.to_owned())))
            .collect();
        for (name, after) in services {
            for dependency in after.iter().filter_map(|dependency| index.get(dependency.as_str())) {
                graph.update_edge(index[name], *dependency, ());
            }
        }
        Self(graph)
    }

    /// Of every service that can never start because of a cycle, one that it is in or depends on: `a → b → a`.
    pub(super) fn cycles(&self) -> BTreeMap<String, String> {
        let mut cycles: HashMap<NodeIndex, String> = HashMap::new();
        // Components come in reverse topological order: dependencies first. Not Tarjan's way, which recurses: a long chain of
        // dependencies must not overflow the stack.
        for component in kosaraju_scc(&self.0) {
            let first = component[0];
            let cyclic = component.len() > 1 || self.0.contains_edge(first, first);
            for node in &component {
                let cycle = if cyclic {
                    Some(self.cycle_through(*node, &component))
                } else {
                    let mut dependencies = self.0.neighbors(*node);
                    dependencies.find_map(|dependency| cycles.get(&dependency).cloned())
                };
                if let Some(cycle) = cycle {
                    cycles.insert(*node, cycle);
                }
            }
        }
        cycles
            .into_iter()
            .map(|(node, cycle)| (self.0[node].clone(), cycle))
            .collect()
    }

    /// The shortest way from a node of a cyclic component back to it.
    fn cycle_through(&self, node: NodeIndex, component: &[NodeIndex]) -> String {
        let component: BTreeSet<_> = component.iter().collect();
        let mut came_from = HashMap::new();
        let mut open = VecDeque::from([node]);
        while let Some(at) = open.pop_front() {
            for next in self.0.neighbors(at).filter(|next| component.contains(next)) {
                if next == node {
                    let mut names = vec![self.0[node].as_str()];
                    let back = std::iter::successors(Some(at), |at| came_from.get(at).copied());
                    names.extend(back.take_while(|at| *at != node).map(|at| self.0[at].as_str()));
                    names.push(&self.0[node]);
                    names.reverse();
                    return names.join(" → ");
                }
                if let std::collections::hash_map::Entry::Vacant(entry) = came_from.entry(next) {
                    entry.insert(at);
                    open.push_back(next);
                }
            }
        }
        self.0[node].clone()
    }

    /// The order in which to stop: dependants before what they depend on.
    pub(super) fn stop_order(&self) -> StopOrder {
        let mut components = Vec::new();
        let mut component_of = HashMap::new();
        for component in kosaraju_scc(&self.0) {
            for node in &component {
                component_of.insert(*node, components.len());
            }
            components.push(component);
        }
        let steps = components
            .iter()
            .enumerate()
            .map(|(index, component)| {
                let related = |direction| -> BTreeSet<usize> {
                    let neighbours = component
                        .iter()
                        .flat_map(|node| self.0.neighbors_directed(*node, direction));
                    let components = neighbours.map(|node| component_of[&node]);
                    components.filter(|other| *other != index).collect()
                };
                Step {
                    members: component.iter().map(|node| self.0[*node].clone()).collect(),
                    left: component.len(),
                    dependants: related(Direction::Incoming).len(),
                    dependencies: related(Direction::Outgoing).into_iter().collect(),
                }
            })
            .collect();
        let step_of = component_of
            .into_iter()
            .map(|(node, step)| (self.0[node].clone(), step));
        StopOrder {
            steps,
            step_of: step_of.collect(),
        }
    }
}

/// Services that are stopped together: one, or those of a cycle.
#[derive(Debug)]
struct Step {
    members: Vec<String>,
    /// Members that are not down yet.
    left: usize,
    /// Steps that depend on this one and are not through.
    dependants: usize,
    dependencies: Vec<usize>,
}

/// The way down: says which services may be stopped now, as others go down.
#[derive(Debug)]
pub(super) struct StopOrder {
    steps: Vec<Step>,
    step_of: HashMap<String, usize>,
}

impl StopOrder {
    /// Those that nothing depends on.
    pub(super) fn first(&self) -> Vec<String> {
        let free = self.steps.iter().filter(|step| step.dependants == 0);
        free.flat_map(|step| step.members.clone()).collect()
    }

    /// Notes that a service is down, or given up on. Returns those that may be stopped now.
    pub(super) fn down(&mut self, service: &str) -> Vec<String> {
        let Some(index) = self.step_of.remove(service) else {
            return Vec::new();
        };
        self.steps[index].left -= 1;
        if self.steps[index].left > 0 {
            return Vec::new();
        }
        let mut free = Vec::new();
        for dependency in std::mem::take(&mut self.steps[index].dependencies) {
            let step = &mut self.steps[dependency];
            step.dependants -= 1;
            if step.dependants == 0 {
                free.extend(step.members.iter().cloned());
            }
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Services = BTreeMap<String, Vec<String>>;

    fn graph(services: &Services) -> Graph {
        let entries: Vec<_> = services
            .iter()
            .map(|(name, after)| (name.as_str(), after.as_slice()))
            .collect();
        Graph::new(entries)
    }

    fn services(edges: &[(&str, &[&str])]) -> Services {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        edges
            .iter()
            .map(|(name, after)| ((*name).to_owned(), names(after)))
            .collect()
    }

    #[test]
    fn a_cycle_and_those_who_wait_for_it_are_named() {
        let services = services(&[
            ("a", &["b"]),
            ("b", &["c"]),
            ("c", &["a"]),
            ("d", &["e", "b"]),
            ("e", &[]),
            ("self", &["self"]),
            ("lost", &["unknown"]),
        ]);
        let cycles = graph(&services).cycles();
        let names: Vec<_> = cycles.keys().map(String::as_str).collect();
        assert_eq!(names, ["a", "b", "c", "d", "self"]);
        assert_eq!(cycles["a"], "a → b → c → a");
        assert_eq!(cycles["d"], cycles["b"]);
        assert_eq!(cycles["self"], "self → self");
    }

    #[test]
    fn dependants_stop_first_and_cycles_together() {
        let services = services(&[
            ("base", &[]),
            ("a", &["b", "base"]),
            ("b", &["a"]),
            ("top", &["a", "unknown"]),
        ]);
        let mut order = graph(&services).stop_order();
        assert_eq!(order.first(), ["top"]);
        let mut both = order.down("top");
        both.sort();
        assert_eq!(both, ["a", "b"]);
        assert_eq!(order.down("b"), Vec::<String>::new());
        assert_eq!(order.down("b"), Vec::<String>::new(), "the second time is none");
        assert_eq!(order.down("a"), ["base"]);
        assert_eq!(order.down("base"), Vec::<String>::new());
    }

    #[test]
    fn a_long_chain_does_not_overflow_the_stack() {
        let name = |index: usize| format!("s{index}");
        let last = 100_000;
        let mut services: Services = (0..last).map(|index| (name(index), vec![name(index + 1)])).collect();
        services.insert(name(last), Vec::new());
        let graph = graph(&services);
        assert_eq!(graph.cycles(), BTreeMap::new());
        assert_eq!(graph.stop_order().first(), [name(0)]);
    }

    fn any_services() -> impl Strategy<Value = Services> {
        let dependencies = proptest::collection::vec(0..45usize, 0..4);
        proptest::collection::vec(dependencies, 0..40).prop_map(|all| {
            let name = |index: usize| format!("s{index}");
            let entry = |(index, after): (usize, Vec<usize>)| (name(index), after.into_iter().map(name).collect());
            all.into_iter().enumerate().map(entry).collect()
        })
    }

    /// Everything that the service depends on, directly or not.
    fn reach(services: &Services, from: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open: Vec<&str> = vec![from];
        while let Some(name) = open.pop() {
            for next in services.get(name).into_iter().flatten() {
                if services.contains_key(next) && found.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn exactly_those_that_reach_a_cycle_are_named(services in any_services()) {
            let cycles = graph(&services).cycles();
            for name in services.keys() {
                let reached = reach(&services, name);
                let on_cycle = |name: &String| reach(&services, name).contains(name);
                let expected = on_cycle(name) || reached.iter().any(on_cycle);
                prop_assert_eq!(cycles.contains_key(name), expected);
            }
            for cycle in cycles.values() {
                let names: Vec<_> = cycle.split(" → ").collect();
                prop_assert_eq!(names.first(), names.last());
                for pair in names.windows(2) {
                    prop_assert!(services[pair[0]].iter().any(|after| after == pair[1]), "{}", cycle);
                }
            }
        }

        #[test]
        fn all_stop_once_and_dependants_first(services in any_services(), picks in proptest::collection::vec(any::<prop::sample::Index>(), 40)) {
            let mut order = graph(&services).stop_order();
            let mut stopping = order.first();
            let mut down = BTreeSet::new();
            let mut asked: BTreeSet<_> = stopping.iter().cloned().collect();
            for pick in picks {
                if stopping.is_empty() {
                    break;
                }
                let service = stopping.swap_remove(pick.index(stopping.len()));
                for name in services.keys().filter(|name| reach(&services, name).contains(&service)) {
                    let together = reach(&services, &service).contains(name);
                    prop_assert!(together || down.contains(name), "{} stops before {}", service, name);
                }
                let next = order.down(&service);
                down.insert(service);
                for name in &next {
                    prop_assert!(asked.insert(name.clone()), "{} is asked twice", name);
                }
                stopping.extend(next);
            }
            prop_assert_eq!(down.len(), services.len());
        }
    }
}
