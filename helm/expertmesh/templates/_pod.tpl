{{/* The pod of a pool. Call with (dict "root" $ "pool" POOL). Nothing in it may depend on the chart's version or on numbers of pods:
whatever changes here replaces the cluster. */}}

{{- define "expertmesh.ownEnv" -}}
- {name: HOME, value: /state}
- {name: USER, value: expertmesh} # libraries ask for a name, which an arbitrary user has nowhere else
- {name: EXPERTMESH_STATE_DIR, value: /state}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- end -}}

{{- define "expertmesh.podEnv" -}}
{{ include "expertmesh.ownEnv" .root }}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: EXPERTMESH_ADMIN_TOKEN_FILE, value: /etc/expertmesh/admin/admin-token}
{{- if eq .pool.role "head" }}
- {name: EXPERTMESH_ADMIN_URL, value: "http://127.0.0.1:8100"} # for `expertmesh scale` and the like in this pod
{{- end }}
{{- end -}}

{{- define "expertmesh.volumes" -}}
- {{ include "expertmesh.model.volume" (dict "root" .root "readOnly" (eq (include "expertmesh.model.source" .root) "pvc")) | nindent 2 | trim }}
- {name: tmp, emptyDir: {}}
- {name: state, emptyDir: {}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .pool.shmSize }}}}
- {name: admin, secret: {secretName: {{ include "expertmesh.adminSecret" .root | quote }}, items: [{key: admin-token, path: admin-token}]}}
{{- if not .root.Values.apiKeys.allowNone }}
- {name: keys, secret: {secretName: {{ include "expertmesh.keysSecret" .root | quote }}, items: [{key: api-keys, path: api-keys}]}}
{{- end }}
{{- if ne .root.Values.tls.mode "none" }}
- {name: tls, secret: {secretName: {{ include "expertmesh.tlsSecret" .root | quote }}}}
{{- end }}
{{- with include "expertmesh.joined" (list .root.Values.extraVolumes .pool.volumes) | fromYamlArray }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "expertmesh.mounts" -}}
- {name: models, mountPath: /models, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: state, mountPath: /state}
- {name: shm, mountPath: /dev/shm}
- {name: admin, mountPath: /etc/expertmesh/admin, readOnly: true}
{{- if not .root.Values.apiKeys.allowNone }}
- {name: keys, mountPath: /etc/expertmesh/keys, readOnly: true}
{{- end }}
{{- if ne .root.Values.tls.mode "none" }}
- {name: tls, mountPath: /etc/expertmesh/tls, readOnly: true}
{{- end }}
{{- with include "expertmesh.joined" (list .root.Values.extraVolumeMounts .pool.volumeMounts) | fromYamlArray }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "expertmesh.ports" -}}
{{- if eq .pool.role "head" }}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: client, containerPort: 10001}
- {name: admin, containerPort: 8100}
{{- if include "expertmesh.incremental" .root }}
- {name: serve, containerPort: 8000}
{{- end }}
{{- else if eq .pool.role "router" }}
- {name: http, containerPort: 8000}
{{- end }}
- {name: metrics, containerPort: 8080}
{{- range $i := until (include "expertmesh.pool.processes" .pool | int) }}
- {name: process-{{ $i }}, containerPort: {{ add 9400 $i }}}
{{- end }}
{{- end -}}

{{- define "expertmesh.lifecycle" -}}
{{- if .pool.lifecycle }}
{{- toYaml .pool.lifecycle }}
{{- else if ne .pool.role "head" }}
preStop:
  exec:
    command:
      - python
      - -m
      - cluster.fleet.pod_drain
      - {{ .pool.role }}
      - {{ include "expertmesh.pool.drainSeconds" .pool | quote }}
{{- end }}
{{- end -}}

{{- define "expertmesh.spread" -}}
{{- if .pool.topologySpreadConstraints }}
{{- toYaml .pool.topologySpreadConstraints }}
{{- else if ne .pool.role "head" }}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "expertmesh.selector" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .pool.role }}
{{- end }}
{{- end -}}

{{- define "expertmesh.podTemplate" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
metadata:
  labels:
    {{- $labels := include "expertmesh.selector" $root | fromYaml }}
    {{- $_ := set $labels "app.kubernetes.io/component" $pool.role }}
    {{- mustMergeOverwrite $labels ($pool.labels | default dict) | toYaml | nindent 4 }}
  annotations:
    {{- $annotations := dict }}
    {{- if eq $pool.role "head" }}
    {{- $_ := set $annotations "expertmesh/config" (include "expertmesh.configChecksum" $root) }}
    {{- end }}
    {{- mustMergeOverwrite $annotations ($pool.annotations | default dict) | toYaml | nindent 4 }}
spec:
  serviceAccountName: "{{ include "expertmesh.serviceAccountName" $root }}{{ eq $pool.role "head" | ternary "-head" "" }}"
  {{- /* Ray's autoscaler, beside the head, asks Kubernetes for pods; KubeRay gives its account the role for that. */}}
  automountServiceAccountToken: {{ and $root.Values.autoscaling.pods (eq $pool.role "head") }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ int64 $pool.terminationGracePeriodSeconds }}
  securityContext:
    {{- include "expertmesh.podSecurityContext" $root | nindent 4 }}
  {{- with include "expertmesh.pullSecrets" $root }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $pool.resourceClaims }}
  resourceClaims:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- range $field := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" "schedulerName" }}
  {{- with get $pool $field }}
  {{ $field }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- with include "expertmesh.spread" (dict "root" $root "pool" $pool) | trim }}
  topologySpreadConstraints:
    {{- . | nindent 4 }}
  {{- end }}
  {{- $model := include "expertmesh.model.init" $root | trim }}
  {{- $own := include "expertmesh.joined" (list $root.Values.extraInitContainers $pool.initContainers) | fromYamlArray }}
  {{- if or $model $own }}
  initContainers:
    {{- with $model }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $own }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ eq $pool.role "head" | ternary "ray-head" "ray-worker" }}
      image: {{ include "expertmesh.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        {{- include "expertmesh.ports" (dict "root" $root "pool" $pool) | trim | nindent 8 }}
      env:
        {{- $own := include "expertmesh.podEnv" (dict "root" $root "pool" $pool) | fromYamlArray }}
        {{- include "expertmesh.variables" (list $own $root.Values.extraEnv $pool.env) | nindent 8 }}
      {{- with include "expertmesh.joined" (list $root.Values.extraEnvFrom $pool.envFrom) | fromYamlArray }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- include "expertmesh.pool.resources" (dict "root" $root "pool" $pool) | nindent 8 }}
      securityContext:
        {{- toYaml ($root.Values.securityContext | default dict) | nindent 8 }}
      {{- include "expertmesh.probes" (dict "root" $root "pool" $pool) | nindent 6 }}
      {{- with include "expertmesh.lifecycle" (dict "root" $root "pool" $pool) | trim }}
      lifecycle:
        {{- . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "expertmesh.mounts" (dict "root" $root "pool" $pool) | nindent 8 }}
    {{- with $pool.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "expertmesh.volumes" (dict "root" $root "pool" $pool) | nindent 4 }}
{{- end -}}

{{/* What the Jobs' pods and that of `helm test` have in common: they run where the head may. */}}
{{- define "expertmesh.helperPod" -}}
serviceAccountName: {{ include "expertmesh.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "expertmesh.podSecurityContext" . | nindent 2 }}
{{- with include "expertmesh.pullSecrets" . }}
{{- . | nindent 0 }}
{{- end }}
{{- range $field := list "nodeSelector" "tolerations" }}
{{- with get $.Values.head $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "expertmesh.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "expertmesh.podSecurityContext" -}}
{{- $context := deepCopy (.Values.podSecurityContext | default dict) -}}
{{- if .Values.openshift -}}
{{- $context = omit $context "runAsUser" "runAsGroup" "fsGroup" -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}
