"""Would catch a change of the chart by which more or fewer pods replace the cluster, and a change of the configuration
that reaches a running cluster, which refuses it, instead of a new one."""

from __future__ import annotations

import pytest

from tests.deploy.kuberay import cluster_hash
from tests.deploy.rendering import CASES, Rendered, case, render

_NUMBERS = ("routers", "expert_workers", "gateways", "min_", "max_routers", "max_expert_workers")


def _set(**values: str) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def _settings(rendered: Rendered) -> dict[str, object]:
    return {name: value for name, value in rendered.arguments.items() if not name.startswith(_NUMBERS)}


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_pods_do_not_replace_the_cluster(name: str) -> None:
    before = case(name)
    after = case(name, *_set(experts__replicas="5", experts__minReplicas="1", experts__maxReplicas="33",
                             routers__maxReplicas="9"))  # fmt: skip
    assert cluster_hash(before.cluster) == cluster_hash(after.cluster)
    groups = {group["groupName"]: group for group in after.cluster["workerGroupSpecs"]}
    assert (groups["experts"]["replicas"], groups["experts"]["maxReplicas"]) == (5, 33)
    # The new number reaches the running cluster as an argument that is changed in place.
    assert before.arguments["expert_workers"] < after.arguments["expert_workers"] or name == "mixtral-8x7b"
    assert _settings(before) == _settings(after)


def test_routers_too() -> None:
    before, after = render(*_set(routers__replicas="1")), render(*_set(routers__replicas="3"))
    assert cluster_hash(before.cluster) == cluster_hash(after.cluster)
    assert (after.arguments["routers"], after.arguments["gateways"]) == (3, 3)


def test_labels_versions_and_what_is_around_do_not_either() -> None:
    before = render("--set", "image.tag=x")
    around = _set(commonLabels__team="a", service__port="80", monitoring__podMonitor__enabled="true")
    after = render("--set", "image.tag=x", *around, "--set", "ingress.enabled=true,ingress.hosts[0]=a.b")
    assert cluster_hash(before.cluster) == cluster_hash(after.cluster)


@pytest.mark.parametrize("setting", ["config.max_sequences=7", "model.servedName=other", "image.tag=other",
                                     "tls.mode=certManager", "experts.expertWorkersPerPod=2"])  # fmt: skip
def test_what_needs_a_new_cluster_makes_one(setting: str) -> None:
    """Serve would hand it to the running application, which refuses it."""
    assert cluster_hash(render().cluster) != cluster_hash(render("--set", setting).cluster)


@pytest.mark.parametrize("name", ["minimal", "mtls", "monitored"])
def test_an_upgrade_changes_no_job(name: str) -> None:
    """An API server refuses another spec of a Job that is there, and so the upgrade: another spec is another Job."""
    own = ["--set", "model.storage.type=pvc,model.storage.size=120Gi"]
    before = {job["metadata"]["name"]: job["spec"] for job in case(name, *own).all("Job")}
    assert before
    for setting in ("image.tag=other", "image.pullSecrets[0]=registry", "openshift=true", "gpu.enabled=false",
                    "model.tokenSecret.name=other", "model.storage.existingClaim=other", "extraEnv[0].name=A",
                    "serviceAccount.name=other", "rayAuth.existingSecret=other", "head.nodeSelector.a=b",
                    "model.download.backoffLimit=2", "commonLabels.a=b", "experts.replicas=3"):  # fmt: skip
        after = {job["metadata"]["name"]: job["spec"] for job in case(name, *own, "--set", setting).all("Job")}
        assert not [job for job in before.keys() & after.keys() if before[job] != after[job]], setting
    after = {job["metadata"]["name"]: job["spec"] for job in case(name, *own, *_set(commonLabels__a="b")).all("Job")}
    assert before == after, "labels need no other Job"


def test_ray_makes_pods_for_what_the_controller_asks() -> None:
    """KubeRay passes no changed `replicas` of a RayService on, so its pools grow by Ray's autoscaler."""
    for name in CASES:
        cluster = case(name).cluster
        assert cluster["enableInTreeAutoscaling"] is True
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    fixed = render("--set", "autoscaling.pods=false").cluster
    assert "enableInTreeAutoscaling" not in fixed
    assert all(g["minReplicas"] == g["replicas"] == g["maxReplicas"] for g in fixed["workerGroupSpecs"])


def test_a_budget_is_a_number_below_the_pool() -> None:
    """Percentages and `maxUnavailable` do nothing for pods of a custom resource; the whole pool would block drains."""
    budgets = {
        b["metadata"]["name"]: b["spec"]["minAvailable"] for b in case("mixtral-8x7b").all("PodDisruptionBudget")
    }
    assert budgets == {"r-expertmesh-routers": 1, "r-expertmesh-experts": 7}
    assert not case("one-node").all("PodDisruptionBudget")
    for budget in case("mixtral-8x22b").all("PodDisruptionBudget"):  # whose expert pods are never ready
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow", "they would hold up drains for ever"
