// Reads a JSON list of manifests, prints a JSON list of what is wrong with each: published schemas as @kubernetes-models has them.
import { readFileSync } from "node:fs";

const groups = {
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
  "gateway.networking.k8s.io/v1": "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1",
  "cert-manager.io/v1": "@kubernetes-models/cert-manager/cert-manager.io/v1",
};

const found = [];
for (const manifest of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    const kinds = await import(groups[manifest.apiVersion]);
    new kinds[manifest.kind](manifest).validate();
    found.push(null);
  } catch (error) {
    found.push(String(error.message ?? error));
  }
}
console.log(JSON.stringify(found));
