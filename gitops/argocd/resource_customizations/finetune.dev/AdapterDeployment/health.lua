-- Health of an AdapterDeployment. Lua 5.1 with the base library only, which is what Argo CD gives.
local function answer(status, message)
  return { status = status, message = message }
end

local status = obj.status
if status == nil or status.phase == nil or status.observedGeneration == nil then
  return answer("Progressing", "Waiting for the operator")
end
if obj.metadata.generation ~= nil and status.observedGeneration ~= obj.metadata.generation then
  return answer("Progressing", "Waiting for the operator to see generation " .. obj.metadata.generation)
end

-- The operator's own words: status.reason and status.message say why, and how to mend it.
local function told(otherwise)
  local reason, message = status.reason or "", status.message or ""
  if reason ~= "" and message ~= "" then
    return reason .. ": " .. message
  end
  return reason ~= "" and reason or otherwise
end

if status.phase == "Ready" then
  return answer("Healthy", told("Ready"))
end
if status.phase == "Blocked" or status.phase == "Degraded" or status.phase == "Failed" then
  return answer("Degraded", told(status.phase))
end
return answer("Progressing", told(status.phase))
