{{/* Where the model comes from and where it lies. */}}
{{- define "expertmesh.model.source" -}}
{{- if ne .Values.model.source "auto" -}}{{ .Values.model.source }}
{{- else if eq .Values.model.id "default" -}}default
{{- else -}}hub{{- end -}}
{{- end -}}

{{- define "expertmesh.model.name" -}}
{{- if .Values.model.servedName -}}{{ .Values.model.servedName }}
{{- else if eq (include "expertmesh.model.source" .) "default" -}}SmolLM2-8x135M-Instruct
{{- else -}}{{ .Values.model.id | base }}{{- end -}}
{{- end -}}

{{/* The directory in every pod. Another model or revision is another directory, so that nothing is overwritten. */}}
{{- define "expertmesh.model.directory" -}}
{{- if eq (include "expertmesh.model.source" .) "pvc" -}}
/models/{{ trimAll "/" .Values.model.path }}
{{- else -}}
{{- $of := printf "%s %s %s" .Values.model.id .Values.model.revision .Values.model.uri -}}
/models/{{ regexReplaceAll "[^A-Za-z0-9._-]+" (include "expertmesh.model.name" .) "-" }}-{{ sha256sum $of | trunc 8 }}
{{- end -}}
{{- end -}}

{{- define "expertmesh.model.claim" -}}
{{ default (printf "%s-models" (include "expertmesh.fullname" .)) .Values.model.storage.existingClaim }}
{{- end -}}

{{/* Call with (dict "root" $ "readOnly" WHETHER). Volumes that many may only read are given to nobody who does not say that he only reads. */}}
{{- define "expertmesh.model.volume" -}}
name: models
{{- with .root.Values.model.storage }}
{{- if eq .type "pvc" }}
persistentVolumeClaim: {claimName: {{ include "expertmesh.model.claim" $.root | quote }}{{ $.readOnly | ternary ", readOnly: true" "" }}}
{{- else if .size }}
emptyDir: {sizeLimit: {{ .size }}}
{{- else }}
emptyDir: {}
{{- end }}
{{- end }}
{{- end -}}

{{/* What rclone copies: a URL of S3 or Google's storage becomes its form of it, with credentials from the environment. */}}
{{- define "expertmesh.model.remote" -}}
{{- .Values.model.uri | replace "s3://" ":s3,provider=AWS,env_auth=true:" | replace "gs://" ":gcs,env_auth=true:" -}}
{{- end -}}

{{/* The container that fetches the model into /models, once. */}}
{{- define "expertmesh.model.fetch" -}}
{{- $directory := include "expertmesh.model.directory" . -}}
name: model
{{- if eq (include "expertmesh.model.source" .) "objectStorage" }}
image: {{ .Values.model.download.image | quote }}
command: ["/bin/sh", "-c"]
args:
  - |
    set -eu
    [ -e "$1/.expertmesh-complete" ] && exit 0
    to="$1" && shift
    rclone copy --stats-one-line --stats 10s --log-level INFO "$@" "$to"
    touch "$to/.expertmesh-complete"
  - fetch
  - {{ $directory | quote }}
  {{- range .Values.model.download.args }}
  - {{ . | quote }}
  {{- end }}
  - {{ include "expertmesh.model.remote" . | quote }}
{{- else }}
image: {{ include "expertmesh.image" . | quote }}
command: [expertmesh, model, fetch]
args:
  - {{ eq (include "expertmesh.model.source" .) "default" | ternary "default" .Values.model.id | quote }}
  - {{ $directory | quote }}
  {{- with .Values.model.revision }}
  - {{ printf "--revision=%s" . | quote }}
  {{- end }}
{{- end }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
env:
  {{- $token := list }}
  {{- with .Values.model.tokenSecret }}
  {{- if .name }}
  {{- $token = list (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" .name "key" .key))) }}
  {{- end }}
  {{- end }}
  {{- $own := include "expertmesh.ownEnv" . | fromYamlArray }}
  {{- include "expertmesh.variables" (list $own $token .Values.extraEnv .Values.model.download.env) | nindent 2 }}
{{- with include "expertmesh.joined" (list .Values.extraEnvFrom .Values.model.download.envFrom) | fromYamlArray }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .Values.model.download.resources | nindent 2 }}
securityContext:
  {{- toYaml (.Values.securityContext | default dict) | nindent 2 }}
volumeMounts:
  - {name: models, mountPath: /models}
  - {name: tmp, mountPath: /tmp}
  - {name: state, mountPath: /state}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The init container of a pod: fetches where each has a copy, waits where a Job fetches for all. */}}
{{- define "expertmesh.model.init" -}}
{{- if ne (include "expertmesh.model.source" .) "pvc" }}
{{- if eq .Values.model.storage.type "pvc" }}
- name: model
  image: {{ include "expertmesh.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: ["/bin/sh", "-c"]
  args:
    - 'until [ -e "$0/.expertmesh-complete" ]; do echo "waiting for the Job that fetches $0"; sleep 5; done'
    - {{ include "expertmesh.model.directory" . | quote }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {cpu: 100m, memory: 64Mi}
  securityContext:
    {{- toYaml (.Values.securityContext | default dict) | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models, readOnly: true}
{{- else }}
- {{ include "expertmesh.model.fetch" . | nindent 2 | trim }}
{{- end }}
{{- end }}
{{- end -}}
