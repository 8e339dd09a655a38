{{/* Pools of pods. A pool is its values, with `name` and `role` (head, router, expert). */}}

{{/* `experts` and every entry of `additionalExpertGroups`, as a list. What an entry does not say is as in `experts`; what it says stands for
itself: labels of nodes that were merged with those of another kind of GPU would fit no node. */}}
{{- define "expertmesh.expertPools" -}}
{{- $pools := list (mustMergeOverwrite (dict "name" "experts" "role" "expert" "routersPerPod" 0) .Values.experts) -}}
{{- range .Values.additionalExpertGroups | default list -}}
{{- $pool := dict "role" "expert" "routersPerPod" 0 -}}
{{- range $values := list $.Values.experts . -}}
{{- range $key, $value := $values -}}
{{- $_ := set $pool $key $value -}}
{{- end -}}
{{- end -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- toYaml $pools -}}
{{- end -}}

{{- define "expertmesh.pools" -}}
{{- $routers := mustMergeOverwrite (dict "name" "routers" "role" "router") (deepCopy .Values.routers) -}}
{{- toYaml (concat (list $routers) (include "expertmesh.expertPools" . | fromYamlArray)) -}}
{{- end -}}

{{/* Ports of the processes' own metrics, /health and /ready: the first free one from 9400 on is each one's. */}}
{{- define "expertmesh.pool.processes" -}}
{{- if eq .role "head" }}1
{{- else }}{{ add (int .routersPerPod) (int .expertWorkersPerPod) (eq .role "router" | ternary 1 0) }}{{- end -}}
{{- end -}}

{{/* Resources of the container: those of the pool and its GPUs. Call with (dict "root" $ "pool" POOL). */}}
{{- define "expertmesh.pool.resources" -}}
{{- $resources := deepCopy (.pool.resources | default dict) -}}
{{- if and .root.Values.gpu.enabled (ne .pool.role "head") (not .pool.resourceClaims) -}}
{{- $gpus := .pool.gpus | default (add (int .pool.routersPerPod) (int .pool.expertWorkersPerPod)) | int -}}
{{- $resources = mustMergeOverwrite (dict "limits" (dict .root.Values.gpu.resource $gpus)) $resources -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "expertmesh.pool.rayStartParams" -}}
{{- $params := dict "object-store-memory" "100000000" -}}
{{- if eq .pool.role "head" -}}
{{- $_ := set $params "num-cpus" .pool.numCpus -}}
{{- $_ := set $params "dashboard-host" "0.0.0.0" -}}
{{- else -}}
{{- $resources := dict -}}
{{- if eq .pool.role "router" -}}
{{- $_ := set $resources "expertmesh_router" (int .pool.routersPerPod) -}}
{{- $_ := set $resources "expertmesh_gateway" 1 -}}
{{- end -}}
{{- with int .pool.expertWorkersPerPod -}}
{{- $_ := set $resources "expertmesh_expert" . -}}
{{- end -}}
{{- /* KubeRay writes the value into a shell command as it is. */ -}}
{{- $_ := set $params "resources" (printf "%q" (toJson $resources)) -}}
{{- /* KubeRay and Ray's autoscaler see GPUs in limits whose name ends in gpu, and CPUs in limits and requests. */ -}}
{{- if and .root.Values.gpu.enabled (or .pool.resourceClaims (not (hasSuffix "gpu" .root.Values.gpu.resource))) -}}
{{- $_ := set $params "num-gpus" (.pool.gpus | default (add (int .pool.routersPerPod) (int .pool.expertWorkersPerPod)) | toString) -}}
{{- end -}}
{{- end -}}
{{- $resources := .pool.resources | default dict -}}
{{- if not (or (hasKey $params "num-cpus") ($resources.limits | default dict).cpu ($resources.requests | default dict).cpu) -}}
{{- $_ := set $params "num-cpus" "1" -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $params (.pool.rayStartParams | default dict)) -}}
{{- end -}}

{{/* How long a pod may take to end. */}}
{{- define "expertmesh.pool.drainSeconds" -}}
{{- sub (int .terminationGracePeriodSeconds) 15 | max 1 -}}
{{- end -}}
