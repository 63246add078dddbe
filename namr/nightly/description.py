"""What people ask of a release before they look at its page: facts, one a line, and how two releases differ.

Not covered: the page with pictures (`release_report`), and what is stored of a release (`release.releases`).
"""

from namr.nightly import release_report
from namr.release.releases import Release
from namr.store import storage


def facts(release: Release) -> dict[str, str]:
    """By name, in the order of their weight."""
    manifest, measured = release.manifest, release_report.read(release)
    assessed, counts = measured.assessment, manifest.counts
    told = {
        "created": manifest.created,
        "follows": manifest.previous or "none: it was never current, or the first",
        "model": f"{manifest.model_name} {manifest.model_version} ({manifest.model_digest[:12]})",
        "dataset": f"{manifest.dataset_uri} version {manifest.dataset_version}",
        "images": counts.in_words,
        "built": measured.built or "by an earlier namr",
        "segments": " + ".join(f"{each.num_entries:,}" for each in manifest.segments),
        "dead entries": str(manifest.num_entries - counts.num_indexed),
        "index": f"{manifest.index_key}, template {manifest.template_hash[:12]}, metric {manifest.metric}",
        "searched by": f"side {manifest.structure_side}, {assessed.probed}, depth {manifest.depth}",
    }
    told |= {name: f"{recall:.3f}" for name, recall in assessed.recalls.items()}
    told |= {
        f"Recall@1, {each.side}": f"{each.recall_at_1:.3f}"
        for each in assessed.sides
        if each.recall_at_1 is not None
    }
    for what, compared in (("Recall@1", measured.against_current), ("MAP@R", measured.map_at_r)):
        if compared:
            of_same = f"of the same {compared.num_queries} images"
            told[f"{what}, then and now"] = f"{compared.then:.3f}, {compared.here:.3f} {of_same}"
    if measured.effective_rank is not None:
        told["effective rank"] = f"{measured.effective_rank:.1f}"
    if found := measured.searched:
        told["near-duplicates"] = f"{found.num_pairs} pairs of {found.num_groups} groups"
        if found.num_suspects is not None:
            told["label suspects"] = str(found.num_suspects)
        told["looked for by"] = f"{found.num_asked:,} images"
    if drift := measured.drift:
        told["embeddings"] = f"mean norm {drift.here.mean_norm:.4g}, {drift.here.num_flat_axes} flat axes"
        if drift.shift is not None:
            told["shift"] = f"{drift.shift:.4f}, of the embeddings against the release that served"
    if latency := measured.latency:
        told["latency"] = f"{latency.here.p50_ms:.2f} ms (median), {latency.here.p95_ms:.2f} ms (95 %)"
        if then := latency.then:
            told["latency then"] = f"{then.p50_ms:.2f} ms, {then.p95_ms:.2f} ms"
    told["imbalance"] = f"{measured.imbalance:.2f}"
    told["queries/s"] = f"{assessed.queries_per_s:,.0f}"
    told["stored"] = f"{sum(stored.size_bytes for stored in set(manifest.objects())) / 1e6:,.1f} MB"
    if measured.aged:
        told["template has aged"] = measured.aged
    if manifest.is_prepared:
        told["prepared"] = (
            manifest.objections or "the gate lets it pass; `namr releases publish` switches to it"
        )
    if manifest.forced:
        told["forced"] = f"by {manifest.forced.by}: {manifest.forced.reason} ({manifest.forced.objections})"
    return told


def places(release: Release) -> dict[str, str]:
    """Where its page and its tables lie, by name."""
    manifest = release.manifest
    listed = {"page": manifest.report_html} | {f"table {name}": it for name, it in manifest.tables.items()}
    return {name: storage.join(release.releases_uri, it.name) for name, it in listed.items() if it}


def differences(one: Release, other: Release) -> dict[str, tuple[str, str]]:
    """Those facts that aren't the same of both, and how many bytes the other has that the first has not."""
    left, right = facts(one), facts(other)
    names = dict.fromkeys([*left, *right])
    found = {name: (left.get(name, "-"), right.get(name, "-")) for name in names}
    new = set(other.manifest.objects()) - set(one.manifest.objects())
    shared = {
        "not shared": ("-", f"{sum(stored.size_bytes for stored in new) / 1e6:,.1f} MB in {len(new)} objects")
    }
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]} | shared
