{{/* The RayCluster, as a RayService and a RayCluster both hold it. */}}
{{- define "expertmesh.cluster" -}}
{{- $root := . -}}
rayVersion: {{ .Values.rayVersion | quote }}
{{- if .Values.rayAuth.enabled }}
authOptions:
  mode: token
  {{- with .Values.rayAuth.existingSecret }}
  secretName: {{ . | quote }}
  {{- end }}
{{- end }}
{{- if .Values.autoscaling.pods }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: {{ .Values.autoscaling.version }}
  idleTimeoutSeconds: {{ int64 .Values.autoscaling.idleTimeoutSeconds }}
  upscalingMode: Default
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources:
    {{- toYaml .Values.autoscaling.resources | nindent 4 }}
  securityContext:
    {{- toYaml (.Values.securityContext | default dict) | nindent 4 }}
{{- end }}
{{- with .Values.gcsFaultTolerance }}
{{- if eq .backend "redis" }}
gcsFaultToleranceOptions:
  redisAddress: {{ .redisAddress | quote }}
  {{- with .redisPasswordSecret }}
  {{- if .name }}
  redisPassword:
    valueFrom: {secretKeyRef: {name: {{ .name | quote }}, key: {{ .key | quote }}}}
  {{- end }}
  {{- end }}
{{- else if eq .backend "rocksdb" }}
gcsFaultToleranceOptions:
  backend: rocksdb
  storage:
    {{- if .storage.claimName }}
    claimName: {{ .storage.claimName | quote }}
    {{- else }}
    size: {{ .storage.size }}
    {{- with .storage.className }}
    storageClassName: {{ . | quote }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end }}
headGroupSpec:
  {{- $head := mustMergeOverwrite (dict "name" "head" "role" "head") (deepCopy .Values.head) }}
  {{- $arguments := dict "root" $root "pool" $head }}
  serviceType: ClusterIP
  rayStartParams:
    {{- include "expertmesh.pool.rayStartParams" $arguments | nindent 4 }}
  template:
    {{- include "expertmesh.podTemplate" $arguments | nindent 4 }}
workerGroupSpecs:
  {{- range $pool := include "expertmesh.pools" . | fromYamlArray }}
  {{- $arguments := dict "root" $root "pool" $pool }}
  - groupName: {{ $pool.name | quote }}
    replicas: {{ int64 $pool.replicas }}
    {{- if $root.Values.autoscaling.pods }}
    minReplicas: {{ int64 $pool.minReplicas }}
    maxReplicas: {{ int64 $pool.maxReplicas }}
    {{- else }}
    minReplicas: {{ int64 $pool.replicas }}
    maxReplicas: {{ int64 $pool.replicas }}
    {{- end }}
    rayStartParams:
      {{- include "expertmesh.pool.rayStartParams" $arguments | nindent 6 }}
    template:
      {{- include "expertmesh.podTemplate" $arguments | nindent 6 }}
  {{- end }}
{{- end -}}
