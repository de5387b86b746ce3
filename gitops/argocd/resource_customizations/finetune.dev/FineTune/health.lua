-- Health of a FineTune. Lua 5.1 with the base library only, which is what Argo CD gives.
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

local function condition(type)
  for _, c in ipairs(status.conditions or {}) do
    if c.type == type then
      return c
    end
  end
  return {}
end

if status.phase == "Failed" then
  return answer("Degraded", told("Failed"))
end
if status.phase == "Suspended" and obj.spec.suspend == true then
  return answer("Suspended", told("Suspended by spec.suspend"))
end
if status.phase == "Succeeded" then
  -- The run is over, but what was declared (gates that pass) does not hold, and nothing will serve this adapter.
  local gate = condition("GatePassed")
  if gate.status == "False" then
    return answer("Degraded", (gate.reason or "GateNotPassed") .. ": " .. (gate.message or "the gates did not pass"))
  end
  return answer("Healthy", told("Succeeded"))
end

-- Queued counts as Progressing: a run that waits for quota must not mark the whole application Suspended.
local progress = status.progress or {}
if status.phase == "Training" and (progress.totalSteps or 0) > 0 then
  return answer("Progressing", "Training, step " .. (progress.step or 0) .. " of " .. progress.totalSteps)
end
return answer("Progressing", told(status.phase))
